"""The rank of a value among all pairs, from one streaming pass with bounded memory.

A sketch counts the order keys of float32 values with their lowest bits dropped: as few bits as leave at most
`MAX_BINS` distinct keys. Up to that many distinct values the ranks are exact; beyond, values that differ by less than
the dropped bits share their mean rank. How many bits are dropped depends on the set of values alone, so the ranks do
not depend on how the pairs were split over shards and workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Float32, Float64, Int64, UInt32
from pipeline.selection.keys import order_keys, sum_equal

MAX_BINS = 1 << 18


class RankSketch:
    """Counts of order keys at the finest resolution that fits `MAX_BINS` entries; sketches can be merged."""

    def __init__(self) -> None:
        self.shift = 0
        self.bins: UInt32 = np.empty(0, np.uint32)
        self.counts: Int64 = np.empty(0, np.int64)

    def add(self, values: Float32) -> None:
        """Count `values` [n] float32; those that are not finite are left out."""
        keys = order_keys(values[np.isfinite(values)]) >> np.uint32(self.shift)
        bins, counts = np.unique(keys, return_counts=True)
        self._take(bins, counts)

    def merge(self, other: RankSketch) -> None:
        """Count what `other` has counted, too."""
        shift = max(self.shift, other.shift)
        self._coarsen(shift)
        self._take(other.bins >> np.uint32(shift - other.shift), other.counts)

    def table(self) -> RankTable:
        """The ranks of everything counted so far."""
        total = max(int(self.counts.sum()), 1)
        middle = np.cumsum(self.counts) - self.counts / 2
        return RankTable(self.shift, self.bins, middle / total)

    def _take(self, bins: UInt32, counts: Int64) -> None:
        self.bins, self.counts = sum_equal(np.concatenate([self.bins, bins]), np.concatenate([self.counts, counts]))
        while len(self.bins) > MAX_BINS:
            self._coarsen(self.shift + 1)

    def _coarsen(self, shift: int) -> None:
        self.bins, self.counts = sum_equal(self.bins >> np.uint32(shift - self.shift), self.counts)
        self.shift = shift


@dataclass(frozen=True)
class RankTable:
    """Fractional ranks: of `bins` [b] (sorted keys without their `shift` lowest bits), `ranks` [b] in (0, 1)."""

    shift: int
    bins: UInt32
    ranks: Float64

    def rank(self, values: Float32) -> Float64:
        """Share of the pairs below each value plus half the share of those equal to it; NaN where not finite."""
        result = np.full(np.shape(values), np.nan)
        finite = np.isfinite(values)
        if len(self.bins) and finite.any():
            keys = order_keys(np.atleast_1d(values)[np.atleast_1d(finite)]) >> np.uint32(self.shift)
            result[finite] = self.ranks[np.minimum(np.searchsorted(self.bins, keys), len(self.bins) - 1)]
        return result


def merged(sketches: Iterable[RankSketch]) -> RankSketch:
    """One sketch of everything that `sketches` counted."""
    total = RankSketch()
    for sketch in sketches:
        total.merge(sketch)
    return total
