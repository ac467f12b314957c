"""Radix selection over the bits of key and complemented uid: the prefixes of the boundaries that are searched for."""

from __future__ import annotations

import numpy as np

from pipeline.arrays import Bool, Int64, UInt64
from pipeline.selection.boundaries import Boundaries
from pipeline.selection.keys import KEY_BITS
from pipeline.selection.quotas import Counts
from pipeline.selection.recipe import Judged

UID_BITS = 128


class Search:
    """Prefixes of the boundaries that are still searched for, `depth` digits of `bits` bits long."""

    def __init__(self, strata: int, active: Int64, left: Int64, bits: int) -> None:
        self.strata = strata
        self.active = active
        self.left = left.astype(np.int64)
        self.bits = bits
        self.depth = 0
        self.key = np.zeros(len(active), dtype=np.uint32)
        self.high = np.zeros(len(active), dtype=np.uint64)
        self.low = np.zeros(len(active), dtype=np.uint64)

    def descend(self, histogram: Counts) -> Int64:
        """Fix the next digit of each prefix from the counts [a, 2^bits]; returns how many pairs share it [a]."""
        above = np.cumsum(histogram[:, ::-1], axis=1)
        place = (above < self.left[:, None]).sum(axis=1)
        rows = np.arange(len(self.active))
        inside: Int64 = histogram[rows, histogram.shape[1] - 1 - place]
        self.left = self.left - (above[rows, place] - inside)
        digit = (histogram.shape[1] - 1 - place).astype(np.uint64)
        offset = self.depth * self.bits
        if offset < KEY_BITS:
            self.key |= (digit << np.uint64(KEY_BITS - offset - self.bits)).astype(np.uint32)
        elif offset < KEY_BITS + 64:
            self.high |= digit << np.uint64(KEY_BITS + 64 - offset - self.bits)
        else:
            self.low |= digit << np.uint64(KEY_BITS + 128 - offset - self.bits)
        self.depth += 1
        return inside

    def settle(self, found: Boundaries, done: Bool) -> None:
        """Where all pairs of the prefix are taken, the boundary is the last place that the prefix can have."""
        at = self.active[done]
        found.key[at] = self.key[done]
        found.high[at] = ~self.high[done]
        found.low[at] = ~self.low[done]

    def keep_only(self, mask: Bool) -> None:
        """Go on with some of the prefixes."""
        for name in ("active", "left", "key", "high", "low"):
            setattr(self, name, getattr(self, name)[mask])

    def matching(self, judged: Judged) -> tuple[Int64, Int64]:
        """Which judged rows share a prefix [c], and which prefix [c]."""
        lookup = np.full(self.strata, -1, dtype=np.int64)
        lookup[self.active] = np.arange(len(self.active))
        offset = self.depth * self.bits
        shift = np.uint32(max(KEY_BITS - offset, 0))
        prefix = self.key >> shift
        if judged.stratum is None:
            if lookup[0] < 0:
                return np.empty(0, np.int64), np.empty(0, np.int64)
            rows = np.flatnonzero((judged.keys >> shift) == prefix[0])
            which = np.zeros(len(rows), dtype=np.int64)
        else:
            which = lookup[judged.stratum]
            rows = np.flatnonzero((which >= 0) & ((judged.keys >> shift) == prefix[which]))
            which = which[rows]
        if offset > KEY_BITS and len(rows):
            high, low = self.complements(judged, rows)
            shift_high = np.uint64(max(KEY_BITS + 64 - offset, 0))
            same = (high >> shift_high) == (self.high[which] >> shift_high)
            if offset > KEY_BITS + 64:
                shift_low = np.uint64(KEY_BITS + 128 - offset)
                same &= (low >> shift_low) == (self.low[which] >> shift_low)
            rows, which = rows[same], which[same]
        return rows, which

    def next_digits(self, judged: Judged, rows: Int64) -> Int64:
        """The next digit of the order of some judged rows [c]."""
        offset = self.depth * self.bits
        mask = np.uint64((1 << self.bits) - 1)
        if offset < KEY_BITS:
            return ((judged.keys[rows] >> np.uint32(KEY_BITS - offset - self.bits)) & np.uint32(mask)).astype(np.int64)
        high, low = self.complements(judged, rows)
        if offset < KEY_BITS + 64:
            return ((high >> np.uint64(KEY_BITS + 64 - offset - self.bits)) & mask).astype(np.int64)
        return ((low >> np.uint64(KEY_BITS + 128 - offset - self.bits)) & mask).astype(np.int64)

    @staticmethod
    def complements(judged: Judged, rows: Int64) -> tuple[UInt64, UInt64]:
        """Complemented uids of some judged rows: higher means earlier, as for keys."""
        high, low = judged.span.uids()
        places = judged.places()[rows] - judged.span.start
        return ~high[places], ~low[places]
