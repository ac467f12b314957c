"""Counting pairs per source or caption in bounded memory, and the uncertainty of a kept share."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Group:
    """Pairs that share a source or a caption: how many there are, how many are kept, and one of them."""

    name: Hashable
    pairs: int
    kept: int
    #: Shard and index of one of them.
    example: tuple[int, int]

    @property
    def share(self) -> float:
        """Kept share of the group."""
        return self.kept / self.pairs

    def interval(self) -> tuple[float, float]:
        """95 % interval of the kept share."""
        return wilson(self.kept, self.pairs)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share `hits / total`; `(0, 1)` without any."""
    if total == 0:
        return 0.0, 1.0
    z = 1.96
    share = hits / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


class GroupCounter:
    """Pairs and kept pairs per value, in bounded memory.

    Where a data set has more than `capacity` distinct values, the rarest are let go and their pairs counted in
    `dropped`; counts of frequent values then are lower bounds.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self.capacity = capacity
        self.dropped = 0
        self.pairs = 0
        self.kept = 0
        self._parts: list[_Counts] = []

    def add(self, values: NDArray[Any], kept: NDArray[np.bool_], shard: int, index: NDArray[np.int64]) -> None:
        """Count the pairs of a shard: `values [n]`, `kept [n]`, their positions `index [n]`."""
        if not len(values):
            return
        place = np.column_stack([np.full(len(values), shard, dtype=np.int64), index])
        self._parts.append(_Counts(values, np.ones(len(values), dtype=np.int64), kept.astype(np.int64), place).merged())
        self.pairs += len(values)
        self.kept += int(kept.sum())
        if sum(len(part.names) for part in self._parts) > 2 * self.capacity:
            self._merge()

    def _merge(self) -> _Counts:
        """All counts in one, the rarest values let go where there are too many."""
        if not self._parts:
            return _Counts(np.empty(0), *(np.empty(0, dtype=np.int64),) * 2, np.empty((0, 2), dtype=np.int64))
        columns = zip(*((part.names, part.pairs, part.kept, part.place) for part in self._parts), strict=True)
        merged = _Counts(*(np.concatenate(column) for column in columns)).merged()
        if len(merged.names) > self.capacity:
            order = np.argsort(-merged.pairs, kind="stable")
            self.dropped += int(merged.pairs[order[self.capacity // 2 :]].sum())
            merged = merged.at(order[: self.capacity // 2])
        self._parts = [merged]
        return merged

    def __len__(self) -> int:
        return len(self._merge().names)

    def largest(self, at_least: int = 1) -> list[Group]:
        """The groups of `at_least` so many pairs, the largest first."""
        counts = self._merge()
        order = np.argsort(-counts.pairs, kind="stable")
        return counts.groups(order[counts.pairs[order] >= at_least])

    def gained_and_lost(self, count: int) -> list[Group]:
        """The groups whose number of kept pairs differs most from their part of what is kept, best share first."""
        counts = self._merge()
        change = np.abs(counts.kept - self.kept / max(self.pairs, 1) * counts.pairs)
        groups = counts.groups(np.argsort(-change, kind="stable")[:count])
        return sorted(groups, key=lambda group: (-group.share, str(group.name)))


@dataclass(frozen=True)
class _Counts:
    """Columns of equal length: value, pairs, kept pairs, and the place (shard, index) of one pair `[n, 2]`."""

    names: NDArray[Any]
    pairs: NDArray[np.int64]
    kept: NDArray[np.int64]
    place: NDArray[np.int64]

    def merged(self) -> _Counts:
        """Equal values added up, sorted by value."""
        names, first, inverse = np.unique(self.names, return_index=True, return_inverse=True)
        pairs = np.zeros(len(names), dtype=np.int64)
        kept = np.zeros(len(names), dtype=np.int64)
        np.add.at(pairs, inverse, self.pairs)
        np.add.at(kept, inverse, self.kept)
        return _Counts(names, pairs, kept, self.place[first])

    def at(self, rows: NDArray[np.int64]) -> _Counts:
        """Some of the rows."""
        return _Counts(self.names[rows], self.pairs[rows], self.kept[rows], self.place[rows])

    def groups(self, rows: NDArray[np.int64]) -> list[Group]:
        """Some of the rows as groups."""
        chosen = self.at(rows)
        columns = (chosen.names.tolist(), chosen.pairs.tolist(), chosen.kept.tolist(), chosen.place.tolist())
        return [
            Group(name, pairs, kept, (place[0], place[1])) for name, pairs, kept, place in zip(*columns, strict=True)
        ]
