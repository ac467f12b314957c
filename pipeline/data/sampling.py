"""A seeded draw of pairs from all shards, reading only the shards that hold them.

A pair's global position is the number of samples in the shards before its own plus its index in its shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.decode import Decoder
from pipeline.data.inventory import ShardInfo
from pipeline.data.reader import Sample, read_shard
from pipeline.errors import InputError
from pipeline.types import PairBatch

Positions = NDArray[np.int64]


def offsets(inventory: Sequence[ShardInfo]) -> Positions:
    """The global position of each shard's first sample, and the total: int64 `[shards + 1]`."""
    return np.concatenate([[0], np.cumsum([info.samples for info in inventory], dtype=np.int64)]).astype(np.int64)


def draw_positions(total: int, count: int, seed: int, exclude: Positions | None = None) -> Positions:
    """Draw up to `count` different positions below `total` at random, none of `exclude`: int64, in random order.

    With another `count` the draw is another one: draw generously once and take the first good ones.
    """
    barred = np.unique(np.asarray([] if exclude is None else exclude, np.int64))
    barred = barred[(barred >= 0) & (barred < total)]
    free = total - len(barred)
    ranks = np.random.default_rng(seed).choice(free, size=min(count, free), replace=False)
    # The r-th free position is r plus the barred ones before it, each of which lies at its own value minus its rank.
    return np.asarray(ranks + np.searchsorted(barred - np.arange(len(barred)), ranks, side="right"), np.int64)


def samples_at(info: ShardInfo, indices: Positions, caption: str) -> Iterator[Sample]:
    """The samples of a shard at `indices` (sorted, different), bad ones included; reads no further than the last.

    Raises `InputError` when the shard ends before that: it is not the one that was counted.
    """
    wanted = iter(indices.tolist())
    next_one = next(wanted, None)
    if next_one is None:
        return
    with read_shard(info.url, caption=caption) as reader:
        for sample in reader:
            if sample.index == next_one:
                yield sample
                next_one = next(wanted, None)
                if next_one is None:
                    return
    raise InputError(f"{info.url}: has no sample {next_one}, the inventory counted {info.samples}; was it changed?")


def by_shard(inventory: Sequence[ShardInfo], positions: Positions) -> Iterator[tuple[ShardInfo, int, Positions]]:
    """The shards that hold `positions` (sorted), in order: shard, position of its first sample, indices within it."""
    starts = offsets(inventory)
    if len(positions) and not 0 <= positions[0] <= positions[-1] < starts[-1]:
        raise ValueError(f"positions must lie in [0, {starts[-1]})")
    cuts = np.searchsorted(positions, starts)
    for number, info in enumerate(inventory):
        if cuts[number] < cuts[number + 1]:
            start = int(starts[number])
            yield info, start, positions[cuts[number] : cuts[number + 1]] - start


def load_pairs(
    inventory: Sequence[ShardInfo],
    positions: Positions,
    decoder: Decoder,
    caption: str,
    threads: int = 1,
    prompt: str = "{}",
) -> tuple[PairBatch, Positions]:
    """Decode the pairs at `positions` (all different); bad ones are left out.

    Captions take the place of the `{}` in `prompt`. Returns the batch and the position of each of its pairs, both in
    the order asked for.
    """
    positions = np.asarray(positions, np.int64)
    order = np.argsort(positions, kind="stable")
    ascending = positions[order]
    if np.any(ascending[1:] == ascending[:-1]):
        raise ValueError("positions must all be different")
    batches = [decoder.decode_shard([]).batch]
    found: list[Positions] = []
    done = 0
    for info, _, indices in by_shard(inventory, ascending):
        samples = (_prompted(sample, prompt) for sample in samples_at(info, indices, caption))
        decoded = decoder.decode_shard(samples, threads)
        batches.append(decoded.batch)
        found.append(order[done + decoded.ok])
        done += len(indices)
    asked = np.concatenate(found) if found else np.empty(0, np.int64)
    back = np.argsort(asked)
    return PairBatch.cat(batches)[torch.from_numpy(back)], positions[asked[back]]


def _prompted(sample: Sample, prompt: str) -> Sample:
    return sample if sample.caption is None else replace(sample, caption=prompt.replace("{}", sample.caption))
