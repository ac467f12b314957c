"""Counting pairs per source or caption in bounded memory, and the uncertainty of a kept share."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Group:
    """Pairs that share a source or a caption: how many there are, how many are kept, and one of them."""

    name: Hashable
    pairs: int = 0
    kept: int = 0
    example: tuple[int, int] = (0, 0)  # shard, index

    @property
    def share(self) -> float:
        """Kept share of the group."""
        return self.kept / self.pairs

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson score interval of the kept share, 95 % by default."""
        return wilson(self.kept, self.pairs, z)


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share `hits / total`; `(0, 1)` without any."""
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass
class GroupCounter:
    """Pairs and kept pairs per value, of at most `capacity` values at a time.

    Where a data set has more distinct values than that, the rarest are let go and their pairs counted in
    `dropped`; counts of frequent values then are lower bounds.
    """

    capacity: int = 100_000
    groups: dict[Hashable, Group] = field(default_factory=dict)
    dropped: int = 0
    pairs: int = 0
    kept: int = 0

    def add(self, values: NDArray[np.generic], kept: NDArray[np.bool_], shard: int, index: NDArray[np.int64]) -> None:
        """Count the pairs of a shard: `values [n]`, `kept [n]`, their positions `index [n]`."""
        names, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        totals = np.bincount(inverse, minlength=len(names))
        keeps = np.bincount(inverse, weights=kept, minlength=len(names)).astype(np.int64)
        for name, position, total, keep in zip(names.tolist(), first, totals.tolist(), keeps.tolist(), strict=True):
            group = self.groups.get(name)
            if group is None:
                group = self.groups[name] = Group(name, example=(shard, int(index[position])))
            group.pairs += total
            group.kept += keep
        self.pairs += len(values)
        self.kept += int(kept.sum())
        if len(self.groups) > self.capacity:
            self._let_go()

    def _let_go(self) -> None:
        by_size = sorted(self.groups.values(), key=lambda group: -group.pairs)
        self.dropped += sum(group.pairs for group in by_size[self.capacity // 2 :])
        self.groups = {group.name: group for group in by_size[: self.capacity // 2]}

    def largest(self, count: int, at_least: int = 1) -> list[Group]:
        """The groups with the most pairs."""
        enough = [group for group in self.groups.values() if group.pairs >= at_least]
        return sorted(enough, key=lambda group: (-group.pairs, str(group.name)))[:count]

    def gained_and_lost(self, count: int) -> list[Group]:
        """The groups whose number of kept pairs differs most from their part of what is kept, best share first."""
        overall = self.kept / max(self.pairs, 1)
        by_change = sorted(
            self.groups.values(), key=lambda group: (-abs(group.kept - overall * group.pairs), str(group.name))
        )
        return sorted(by_change[:count], key=lambda group: (-group.share, str(group.name)))
