"""What an evaluation's task does: trains a model on a set of pairs and measures it."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.config import Config
from pipeline.device import device_of_this_task
from pipeline.evaluation.subsets import steps_of_each, train_and_measure
from pipeline.evaluation.zeroshot import load_held_out
from pipeline.stages.computing import ComputingJob
from pipeline.stages.training import TrainingPairs, build_proxy
from pipeline.store import storage
from pipeline.store.pulse import Pulse
from pipeline.tracking import Board


def train_on(config: Config, name: str, positions_file: str, seed: int, pulse_file: str) -> dict[str, Any]:
    """Train a model on the pairs of a set; metric, pairs that were there (size) and value.

    Trackers show `name`; `pulse_file` says how far it is, while it goes on.
    """
    assert config.evaluate is not None  # checked before any task
    assert config.evaluate.shards is not None
    job = ComputingJob(config)
    device = device_of_this_task(config.proxy.precision)
    if device == "cpu":
        torch.set_num_threads(1)
    cache = TrainingPairs(config, judged=True)()
    chosen = np.load(io.BytesIO(storage.read_bytes(positions_file)), allow_pickle=False)
    rows = np.flatnonzero(np.isin(cache.positions, chosen))
    held_out = load_held_out(config.evaluate.shards, job.decoder, config.data.caption, job.threads)
    pulse = Pulse(pulse_file)
    steps = steps_of_each(config, len(cache))
    with Board(job.folder, config, f"evaluation/{name}") as board:

        def log(step: int, values: dict[str, float]) -> None:
            board.log(step, values)
            pulse.beat({"step": step, "steps": steps})

        value = train_and_measure(config, partial(build_proxy, config), cache, rows, held_out, seed, device, log)
    pulse.end()
    return {"metric": held_out.metric, "size": len(rows), "value": value}
