"""What the directions stage computes in its tasks: R, B and V, and per checkpoint what every pair is scored along."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo, inspect_shard
from pipeline.data.positions import Positions, draw_positions
from pipeline.data.samples import Places
from pipeline.data.sampling import load_pairs
from pipeline.data.shards import expand
from pipeline.device import device_of_this_task
from pipeline.errors import InputError
from pipeline.influence import Batches, Replay, prepare, prepare_run, with_reference
from pipeline.literals import WHOLE_RUN
from pipeline.models.manifest import Manifest
from pipeline.prepared import (
    batches_url,
    load_batches,
    plan_url,
    save_batches,
    save_plan,
    score_basis,
    settings_of,
)
from pipeline.replay.record import Record, step_rule
from pipeline.run import RunFolder
from pipeline.stages.computing import ComputingJob
from pipeline.stages.job import OVERDRAW, Job
from pipeline.stages.training import training_pairs
from pipeline.store import storage
from pipeline.types import PairBatch


def write_batches(config: Config) -> dict[str, Any]:
    """Draw, decode and write R, B and V.

    Returns `basis`, what of them and of the model's input decides the scores, and `files`, checksums by file name.
    """
    job = ComputingJob(config)
    batches = draw_batches(job)
    checksum = save_batches(job.folder.root, batches)
    basis = score_basis(config, batches, job.decoder.spec)
    return {"basis": basis, "files": {storage.basename(batches_url(job.folder.root)): checksum}}


def parts_of(config: Config) -> list[list[int]]:
    """The checkpoints whose plans are computed together, as places in the manifest."""
    manifest = Manifest.read(RunFolder(config.out).checkpoint_manifest)
    if settings_of(config).estimator in WHOLE_RUN:
        return [[n for n, entry in enumerate(manifest.checkpoints) if entry.run == run] for run in manifest.runs]
    return [[number] for number in range(len(manifest.checkpoints))]


def draw_batches(job: ComputingJob) -> Batches:
    """R, B and V of a run, by its seed. Raises `InputError` when too few pairs can be read."""
    sizes, target = job.config.reference, job.config.target

    def draw(count: int, seed: int, key: str) -> _Draw:
        return _Draw(job.draw(int(count * OVERDRAW) + 16, seed, job.barred_positions), count, key)

    draws = [
        draw(sizes.pairs, Job.REFERENCE_SEED, "reference.pairs"),
        draw(sizes.gradient_pairs, Job.GRADIENT_SEED, "reference.gradient_pairs"),
    ]
    if target.kind == "train":
        draws.append(draw(target.pairs, Job.TARGET_SEED, "target.pairs"))
    elif target.kind == "holdout":
        draws.append(_Draw(job.held_out_positions, target.pairs, "target.pairs"))
    loaded = _load(job, job.inventory, draws, job.config.data.caption, places=job.folder.places)
    if target.kind == "shards":
        loaded += _other_target(job)
    return Batches(*loaded)


def _other_target(job: ComputingJob) -> list[PairBatch]:
    """V from shards of its own, which are counted first; then only what is drawn is read again."""
    target = job.config.target
    with tempfile.TemporaryDirectory() as folder:

        def places(index: int) -> str:
            return os.path.join(folder, f"{index}.parquet")

        urls = expand(target.shards or [], "target.shards")
        shards = [inspect_shard(index, url, places(index)) for index, url in enumerate(urls)]
        total = sum(shard.samples for shard in shards)
        positions = draw_positions(total, int(target.pairs * OVERDRAW) + 16, job.config.seed + Job.TARGET_SEED)
        draws = [_Draw(positions, target.pairs, "target.pairs")]
        return _load(job, shards, draws, target.caption or job.config.data.caption, target.prompt, places)


@dataclass(frozen=True)
class _Draw:
    """Positions of more pairs than are wanted, how many are, and the key that says so."""

    positions: Positions
    count: int
    key: str


def _load(
    job: ComputingJob,
    shards: list[ShardInfo],
    draws: list[_Draw],
    caption: str,
    prompt: str = "{}",
    places: Places | None = None,
) -> list[PairBatch]:
    """The first readable pairs of each draw; a shard is read once for all of them."""
    asked = np.unique(np.concatenate([draw.positions for draw in draws]))
    pairs, found = load_pairs(shards, asked, job.decoder, caption, job.threads, prompt, places)
    batches = []
    for draw in draws:
        good = draw.positions[np.isin(draw.positions, found)][: draw.count]
        if len(good) < 2:
            raise InputError(f"{draw.key}: expected {draw.count} readable pairs, found {len(good)}")
        batches.append(pairs[torch.from_numpy(np.searchsorted(found, good))])
    return batches


def write_plans(config: Config, numbers: Sequence[int]) -> dict[str, str]:
    """Compute and write the plans of the checkpoints at places `numbers` of the manifest; checksums by file name."""
    job = ComputingJob(config)
    manifest = Manifest.read(job.folder.checkpoint_manifest)
    settings = settings_of(config)
    model = job.model()
    checkpoints = [manifest.checkpoints[number].load(model) for number in numbers]
    model = model.to(device_of_this_task(config.score.precision))
    batches = load_batches(config.out)
    runs = len(manifest.runs)
    if settings.estimator in WHOLE_RUN:
        replay = None
        if settings.estimator == "unrolled" and settings.replay == "exact":
            replay = exact_replay(job, checkpoints[0].run)
        plans = prepare_run(
            model,
            checkpoints,
            batches,
            settings,
            dataset_size=manifest.dataset_size,
            num_runs=runs,
            replay=replay,
        )
    else:
        plans = [
            prepare(
                model,
                checkpoint,
                batches,
                settings,
                dataset_size=manifest.dataset_size,
                num_checkpoints=len(manifest.of_run(checkpoint.run)),
                num_runs=runs,
            )
            for checkpoint in checkpoints
        ]
    files: dict[str, str] = {}
    for number, checkpoint, plan in zip(numbers, checkpoints, plans, strict=True):
        # R's part once per checkpoint, not once in every worker that scores.
        whole = with_reference(model, checkpoint, plan, batches.reference, settings, config.score.batch_size)
        files[storage.basename(plan_url(config.out, number))] = save_plan(config.out, number, whole)
    return files


def exact_replay(job: ComputingJob, run: int) -> Replay:
    """What an exact replay needs of a run trained here. Raises `StageError`, `InputError` where it cannot be exact."""
    record = Record.read(job.folder, run)
    if not record.exact:
        raise InputError(
            "score.replay: exact repeats training in eval() mode and float32, which is not how this run was trained "
            "(dropout, batch statistics or proxy.precision): use score.replay: checkpoints"
        )
    pairs, _ = training_pairs(job)
    cache = pairs()
    initial = record.initial(job.model(run))
    rule = step_rule(record.settings, initial.params)
    return Replay(rule, [float(rate) for rate in record.rates], lambda step: record.pairs(cache, step), initial)
