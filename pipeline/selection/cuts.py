"""Exact cuts of a ranking of any size: the pair at a given rank of each stratum, in a few streaming passes.

The order is total: higher key first, then lower uid, then lower shard and row. It is searched by radix selection over
the 160 bits of key and complemented uid: each pass counts the next digit of the pairs that share the prefix found so
far. As soon as few enough pairs share it they are collected and sorted. Without heavy ties that is two passes over
the values (the first one is the census), plus the uids of a few row groups. Memory depends on the number of strata,
not on the number of pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.selection.keys import UInt32, UInt64
from pipeline.selection.quotas import Counts
from pipeline.selection.recipe import Judged, OpenShard, Recipe
from pipeline.selection.scan import Bool, ScoreFile, ScoreShard
from pipeline.selection.tasks import MapTasks, chunks

#: Pairs that are collected and sorted in memory.
COLLECT = 1 << 21
KEY_BITS, UID_BITS = 32, 128

Int64 = npt.NDArray[np.int64]
_ALL, _NONE = -1, 1 << KEY_BITS
_LAST, _LAST_ROW = np.uint64(2**64 - 1), np.int64(2**63 - 1)


@dataclass
class Census:
    """What the first pass counts: pairs by fate, the size of each stratum, and the first digit of their keys."""

    sizes: Counts
    digits: Counts
    rows: int = 0
    scored: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    pruned: Counter[str] = field(default_factory=Counter)

    def add(self, other: Census) -> None:
        """Count what `other` has counted, too."""
        self.sizes += other.sizes
        self.digits += other.digits
        self.rows += other.rows
        self.scored += other.scored
        self.rejected += other.rejected
        self.pruned += other.pruned


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


def digit_bits(strata: int) -> int:
    """Bits of a digit: as many as keep the histograms of one pass within a few megabytes."""
    return 16 if strata <= 16 else 8 if strata <= 4096 else 4


def take_census(recipe: Recipe, shards: Sequence[ScoreShard], map_tasks: MapTasks) -> Census:
    """Count all pairs (one pass)."""
    total = _empty_census(recipe.strata)
    for part in map_tasks(partial(_count, recipe), chunks(shards)):
        total.add(part)
    return total


def find_boundaries(
    recipe: Recipe, shards: Sequence[ScoreShard], census: Census, ranks: Counts, map_tasks: MapTasks
) -> Boundaries:
    """The boundary in each stratum that takes exactly its first `ranks` [s] pairs (0 to the stratum's size)."""
    found = Boundaries.at_keys(np.where(ranks <= 0, _NONE, _ALL))
    active = np.flatnonzero((ranks > 0) & (ranks < census.sizes))
    if len(active) == 0:
        return found
    bits = digit_bits(recipe.strata)
    search = _Search(recipe.strata, active, ranks[active], bits)
    histogram = census.digits[active]
    while True:
        inside = search.descend(histogram)
        complete = search.left == inside
        search.settle(found, complete)
        search.keep_only(~complete)
        inside = inside[~complete]
        if len(search.active) == 0:
            return found
        if int(inside.sum()) <= COLLECT or search.depth * bits == KEY_BITS + UID_BITS:
            _collect(recipe, shards, search, found, map_tasks)
            return found
        histogram = np.zeros((len(search.active), 1 << bits), dtype=np.int64)
        for part in map_tasks(partial(_histogram, recipe, search), chunks(shards)):
            histogram += part


def count_taken(recipe: Recipe, shards: Sequence[ScoreShard], boundaries: Boundaries, map_tasks: MapTasks) -> Counts:
    """How many pairs of each stratum [s] lie at or before its boundary."""
    total = np.zeros(recipe.strata, dtype=np.int64)
    for part in map_tasks(partial(_taken, recipe, boundaries), chunks(shards)):
        total += part
    return total


class _Search:
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
        """Where all pairs of the prefix are taken, the boundary is the prefix's last place."""
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


def _empty_census(strata: int) -> Census:
    return Census(np.zeros(strata, np.int64), np.zeros((strata, 1 << digit_bits(strata)), np.int64))


def _count(recipe: Recipe, shards: Sequence[ScoreShard]) -> Census:
    census = _empty_census(recipe.strata)
    bits = digit_bits(recipe.strata)
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            for judged in opened.judged():
                digits = judged.keys >> np.uint32(KEY_BITS - bits)
                _count_into(census.digits, judged.stratum, digits)
                if judged.stratum is None:
                    census.sizes[0] += len(judged.keys)
                else:
                    census.sizes += np.bincount(judged.stratum, minlength=recipe.strata)
                census.rows += judged.span.rows
                census.scored += judged.scored
                census.rejected += judged.rejected
                census.pruned += judged.pruned
    return census


def _taken(recipe: Recipe, boundaries: Boundaries, shards: Sequence[ScoreShard]) -> Counts:
    total = np.zeros(recipe.strata, dtype=np.int64)
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            for judged in opened.judged():
                taken = boundaries.takes(judged, shard.index)
                stratum = np.zeros(len(taken), np.int64) if judged.stratum is None else judged.stratum
                total += np.bincount(stratum[taken], minlength=recipe.strata)
    return total


def _histogram(recipe: Recipe, search: _Search, shards: Sequence[ScoreShard]) -> Counts:
    histogram = np.zeros((len(search.active), 1 << search.bits), dtype=np.int64)
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            for judged in opened.judged():
                rows, which = search.matching(judged)
                if len(rows):
                    _count_into(histogram, which, search.next_digits(judged, rows))
    return histogram


def _count_into(histogram: Counts, which: npt.NDArray[np.integer] | None, digits: npt.NDArray[np.integer]) -> None:
    """Add one to `histogram[which, digits]` for each row; `which` None means 0."""
    if which is None:
        histogram[0] += np.bincount(digits, minlength=histogram.shape[1])
        return
    cells, counts = np.unique(which.astype(np.int64) * histogram.shape[1] + digits, return_counts=True)
    histogram.reshape(-1)[cells] += counts


def _collect(
    recipe: Recipe, shards: Sequence[ScoreShard], search: _Search, found: Boundaries, map_tasks: MapTasks
) -> None:
    """Settle the remaining boundaries by collecting the pairs of their prefixes."""
    parts = [part for task in map_tasks(partial(_candidates, recipe, search), chunks(shards)) for part in task]
    which, keys, shard, row = (np.concatenate([part[column] for part in parts]) for column in range(4))
    by_prefix = np.argsort(which, kind="stable")
    ends = np.searchsorted(which[by_prefix], np.arange(len(search.active) + 1))
    undecided: list[tuple[int, int, Int64]] = []
    for place, stratum in enumerate(search.active):
        mine = by_prefix[ends[place] : ends[place + 1]]
        ordered = np.sort(keys[mine])[::-1]
        left = int(search.left[place])
        key = ordered[left - 1]
        tied = mine[keys[mine] == key]
        left -= int((ordered > key).sum())
        found.key[stratum] = key
        if left < len(tied):
            undecided.append((int(stratum), left, tied))
        else:
            found.high[stratum], found.low[stratum] = ~search.high[place], ~search.low[place]
    if undecided:
        rows = np.concatenate([tied for _, _, tied in undecided])
        uids = _uids_of(shards, shard[rows], row[rows], map_tasks)
        end = 0
        for stratum, left, tied in undecided:
            high, low = (part[end : end + len(tied)] for part in uids)
            end += len(tied)
            order = np.lexsort((row[tied], shard[tied], low, high))
            last = order[left - 1]
            found.high[stratum], found.low[stratum] = high[last], low[last]
            found.shard[stratum], found.row[stratum] = shard[tied[last]], row[tied[last]]


def _candidates(
    recipe: Recipe, search: _Search, shards: Sequence[ScoreShard]
) -> list[tuple[Int64, UInt32, Int64, Int64]]:
    """Prefix, key, shard and row of the pairs that share a prefix; at least one (empty) part."""
    empty = np.empty(0, np.int64)
    found = [(empty, np.empty(0, np.uint32), empty, empty)]
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            for judged in opened.judged():
                rows, which = search.matching(judged)
                found.append((which, judged.keys[rows], np.full(len(rows), shard.index), judged.places()[rows]))
    return found


def _uids_of(shards: Sequence[ScoreShard], shard: Int64, row: Int64, map_tasks: MapTasks) -> tuple[UInt64, UInt64]:
    """Uids of the pairs at `row` [n] of shard number `shard` [n]; reads only the row groups they lie in."""
    high, low = np.empty(len(row), np.uint64), np.empty(len(row), np.uint64)
    wanted = [(item, np.flatnonzero(shard == item.index)) for item in shards if (shard == item.index).any()]
    jobs = [(item, row[places]) for item, places in wanted]
    results: Iterable[tuple[UInt64, UInt64]] = (part for task in map_tasks(_read_uids, chunks(jobs)) for part in task)
    for (_, places), (high_part, low_part) in zip(wanted, results, strict=True):
        high[places], low[places] = high_part, low_part
    return high, low


def _read_uids(jobs: Sequence[tuple[ScoreShard, Int64]]) -> list[tuple[UInt64, UInt64]]:
    results = []
    for shard, rows in jobs:
        high, low = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
        with ScoreFile(shard.url) as file:
            for span in file.spans(rows=1):
                here = np.flatnonzero((rows >= span.start) & (rows < span.start + span.rows))
                if len(here):
                    span_high, span_low = span.uids()
                    high[here] = span_high[rows[here] - span.start]
                    low[here] = span_low[rows[here] - span.start]
        results.append((high, low))
    return results
