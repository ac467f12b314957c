"""Where a ranking is cut: the last pair taken of each stratum, and which pairs lie at or before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Bool, Int64, UInt64
from pipeline.selection.keys import KEY_BITS
from pipeline.selection.recipe import Judged

#: Keys that no pair has: below them all, above them all.
ALL, NONE = -1, 1 << KEY_BITS
_LAST, _LAST_ROW = np.uint64(2**64 - 1), np.int64(2**63 - 1)


@dataclass
class Boundaries:
    """The last pair taken of each stratum [s]: its key (-1: every pair is taken, 2^32: none), uid, shard and row."""

    key: Int64
    high: UInt64
    low: UInt64
    shard: Int64
    row: Int64

    @staticmethod
    def at_keys(keys: Int64) -> Boundaries:
        """All pairs whose key is at least `keys` [s]."""
        count = len(keys)
        last = np.full(count, _LAST_ROW)
        return Boundaries(keys.copy(), np.full(count, _LAST), np.full(count, _LAST), last, last.copy())

    def takes(self, judged: Judged, shard: int) -> Bool:
        """Which of the judged rows [k] of shard number `shard` lie at or before the boundary of their stratum."""
        stratum = judged.stratum
        key = int(self.key[0]) if stratum is None else self.key[stratum]
        taken = np.asarray(judged.keys > key)
        tied = np.flatnonzero(judged.keys == key)
        if len(tied) == 0:
            return taken
        place = np.zeros(len(tied), np.int64) if stratum is None else stratum[tied].astype(np.int64)
        whole = (self.high[place] == _LAST) & (self.low[place] == _LAST) & (self.row[place] == _LAST_ROW)
        if whole.all():
            taken[tied] = True
            return taken
        high, low = judged.span.uids()
        rows = judged.places()[tied]
        high, low = high[rows - judged.span.start], low[rows - judged.span.start]
        before = rows <= self.row[place]
        for mine, limit in ((np.full(len(tied), shard), self.shard), (low, self.low), (high, self.high)):
            before = (mine < limit[place]) | ((mine == limit[place]) & before)
        taken[tied] = before
        return taken
