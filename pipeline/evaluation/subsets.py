"""Training on a set of pairs and measuring the model on pairs it never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from pipeline.arrays import Int64
from pipeline.config import Config, EvaluateConfig
from pipeline.evaluation.zeroshot import HeldOut, measure
from pipeline.models.clip import PairModel
from pipeline.replay.schedule import TrainingSettings, data_order
from pipeline.replay.train import Pairs, Trainer

#: Called with the steps taken and the values to record.
Log = Callable[[int, dict[str, float]], None]

#: Added to the run number of every evaluation training, so that none repeats the order of a proxy run.
FIRST_RUN = 1000


def steps_of_each(config: Config, pairs: int) -> int:
    """Steps of every training: `evaluate.steps`, else the proxy's on all `pairs`."""
    proxy, wanted = config.proxy, config.evaluate or EvaluateConfig()
    return wanted.steps or proxy.steps or max(1, round(proxy.epochs * (pairs // proxy.batch_size)))


def train_and_measure(
    config: Config,
    build: Callable[[int], PairModel],
    pairs: Pairs,
    rows: Int64,
    held_out: HeldOut,
    seed: int,
    device: str = "cpu",
    log: Log | None = None,
) -> float:
    """Train a new model on cache `rows` with the proxy's settings (but `evaluate.augment`) and measure it.

    Every set gets the same number of steps, so that small sets are seen more often, not less. Sets smaller than a batch
    are trained with a batch of their size. `log` is called with the steps taken and the values of the last of them:
    `loss` (nats), and at the end the metric by its name.
    """
    proxy, wanted = config.proxy, config.evaluate or EvaluateConfig()
    batch = min(proxy.batch_size, len(rows))
    steps = steps_of_each(config, len(pairs))
    sized = config.model_copy(update={"proxy": proxy.model_copy(update={"batch_size": batch, "workers": 1})})
    settings = TrainingSettings.of(sized, len(rows), FIRST_RUN + seed)
    settings = replace(settings, steps=steps, augment=wanted.augment)
    trainer = Trainer(build(FIRST_RUN + seed), pairs, data_order(np.sort(rows), settings), settings, device)
    tell = log or (lambda step, values: None)
    while trainer.step < steps:
        loss = trainer.advance()
        tell(trainer.step, {"loss": loss})
    value = measure(trainer.model, replace(held_out, batch=held_out.batch.to(torch.device(device))))
    tell(steps, {held_out.metric: value})
    return value
