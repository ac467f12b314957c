"""The directions stage: draws R, B and V, and computes per checkpoint what every pair is scored along."""

from __future__ import annotations

import numpy as np

from pipeline.data.inventory import ShardInfo, inspect_shard
from pipeline.data.sampling import Positions, draw_positions, load_pairs
from pipeline.data.shards import expand
from pipeline.errors import InputError
from pipeline.influence.settings import Batches
from pipeline.stages.job import Job
from pipeline.types import PairBatch

#: More positions are drawn than pairs are wanted, since some will turn out to be bad.
OVERDRAW = 1.25

#: Offsets to the run's seed, so that the draws are independent of each other.
TARGET_SEED, REFERENCE_SEED, GRADIENT_SEED = 101, 102, 103


def held_out_positions(job: Job) -> Positions:
    """Global positions of the pairs held out as the target: none unless `target.kind` is `holdout`."""
    target = job.config.target
    if target.kind != "holdout":
        return np.empty(0, np.int64)
    count = min(int(target.pairs * OVERDRAW) + 16, job.samples // 2)
    return draw_positions(job.samples, count, job.config.seed + TARGET_SEED)


def draw_batches(job: Job) -> Batches:
    """R, B and V of a run, by its seed. Raises `InputError` when too few pairs can be read."""
    config = job.config
    held_out = held_out_positions(job)
    reference = _draw(job, job.inventory, config.reference.pairs, REFERENCE_SEED, held_out, "reference.pairs")
    gradient = _draw(
        job, job.inventory, config.reference.gradient_pairs, GRADIENT_SEED, held_out, "reference.gradient_pairs"
    )
    target = config.target
    if target.kind == "train":
        return Batches(
            reference, gradient, _draw(job, job.inventory, target.pairs, TARGET_SEED, held_out, "target.pairs")
        )
    if target.kind == "holdout":
        pairs, _ = load_pairs(job.inventory, held_out, job.decoder(job.model()), config.data.caption, job.threads)
        return Batches(reference, gradient, _some(pairs[: target.pairs], "target.pairs", target.pairs))
    assert target.shards is not None  # checked by the config
    shards = [inspect_shard(index, url) for index, url in enumerate(expand(target.shards, "target.shards"))]
    nothing = np.empty(0, np.int64)
    return Batches(reference, gradient, _draw(job, shards, target.pairs, TARGET_SEED, nothing, "target.pairs"))


def _draw(job: Job, shards: list[ShardInfo], count: int, seed: int, exclude: Positions, key: str) -> PairBatch:
    total = sum(shard.samples for shard in shards)
    positions = draw_positions(total, int(count * OVERDRAW) + 16, job.config.seed + seed, exclude)
    pairs, _ = load_pairs(shards, positions, job.decoder(job.model()), job.config.data.caption, job.threads)
    return _some(pairs[:count], key, count)


def _some(pairs: PairBatch, key: str, count: int) -> PairBatch:
    if len(pairs) < 2:
        raise InputError(f"{key}: expected {count} readable pairs, found {len(pairs)}")
    return pairs
