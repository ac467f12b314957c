"""Where pairs are: a seeded draw of global positions, and the shards that hold them.

A pair's global position is the number of samples in the shards before its own plus its index in its shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.inventory import ShardInfo

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
