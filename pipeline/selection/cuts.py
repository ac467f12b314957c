"""Exact cuts of a ranking of any size: the pair at a given rank of each stratum, in a few streaming passes.

The order is total: higher key first, then lower uid, then lower shard and row. It is searched by radix selection over
the 160 bits of key and complemented uid: each pass counts the next digit of the pairs that share the prefix found so
far. As soon as few enough pairs share it they are collected and sorted. Without heavy ties that is two passes over
the values (the first one is the census), plus the uids of a few row groups. A single ranking mostly takes the census
alone: the pairs about the place where a sample expects the cut are collected on the way. Memory depends on the number
of strata, not on the number of pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Int64, UInt32, UInt64
from pipeline.selection.boundaries import ALL, NONE, Boundaries
from pipeline.selection.bracket import Bracket, Caught, Places
from pipeline.selection.keys import KEY_BITS
from pipeline.selection.quotas import Counts
from pipeline.selection.recipe import OpenShard, Recipe
from pipeline.selection.scan import ScoreFile, ScoreShard
from pipeline.selection.search import UID_BITS, Search
from pipeline.selection.tasks import MapTasks, chunks

#: Pairs that are collected and sorted in memory.
COLLECT = 1 << 21


@dataclass
class Census:
    """What the first pass counts: pairs by fate, the size of each stratum, and the first digit of their keys.

    `caught` are the pairs about the place where the cut is expected.
    """

    sizes: Counts
    digits: Counts
    rows: int = 0
    scored: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    pruned: Counter[str] = field(default_factory=Counter)
    caught: Caught = field(default_factory=Caught)

    def add(self, other: Census) -> None:
        """Count what `other` has counted, too."""
        self.sizes += other.sizes
        self.digits += other.digits
        self.rows += other.rows
        self.scored += other.scored
        self.rejected += other.rejected
        self.pruned += other.pruned
        self.caught.add(other.caught, COLLECT)


def digit_bits(strata: int) -> int:
    """Bits of a digit: as many as keep the histograms of one pass within a few megabytes."""
    return 16 if strata <= 16 else 8 if strata <= 4096 else 4


def take_census(
    recipe: Recipe, shards: Sequence[ScoreShard], map_tasks: MapTasks, bracket: Bracket | None = None
) -> Census:
    """Count all pairs, and collect those in the `bracket` (one pass)."""
    total = _empty_census(recipe.strata)
    for part in map_tasks(partial(_count, recipe, bracket), chunks(shards)):
        total.add(part)
    return total


def find_boundaries(
    recipe: Recipe, shards: Sequence[ScoreShard], census: Census, ranks: Counts, map_tasks: MapTasks
) -> Boundaries:
    """The boundary in each stratum that takes exactly its first `ranks` [s] pairs (0 to the stratum's size)."""
    found = Boundaries.at_keys(np.where(ranks <= 0, NONE, ALL))
    active = np.flatnonzero((ranks > 0) & (ranks < census.sizes))
    if len(active) == 0:
        return found
    bits = digit_bits(recipe.strata)
    search = Search(recipe.strata, active, ranks[active], bits)
    caught = census.caught.places(int(ranks[0])) if recipe.strata == 1 else None
    if caught is not None:
        search.left -= census.caught.above
        _settle(shards, search, found, np.zeros(len(caught[0]), np.int64), caught, map_tasks)
        return found
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


def _empty_census(strata: int) -> Census:
    return Census(np.zeros(strata, np.int64), np.zeros((strata, 1 << digit_bits(strata)), np.int64))


def _count(recipe: Recipe, bracket: Bracket | None, shards: Sequence[ScoreShard]) -> Census:
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
                if bracket is not None:
                    census.caught.look(bracket, judged, shard.index)
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


def _histogram(recipe: Recipe, search: Search, shards: Sequence[ScoreShard]) -> Counts:
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
    recipe: Recipe, shards: Sequence[ScoreShard], search: Search, found: Boundaries, map_tasks: MapTasks
) -> None:
    """Settle the remaining boundaries by collecting the pairs of their prefixes."""
    parts = [part for task in map_tasks(partial(_candidates, recipe, search), chunks(shards)) for part in task]
    which, keys, shard, row = (np.concatenate([part[column] for part in parts]) for column in range(4))
    _settle(shards, search, found, which, (keys, shard, row), map_tasks)


def _settle(
    shards: Sequence[ScoreShard],
    search: Search,
    found: Boundaries,
    which: Int64,
    places: Places,
    map_tasks: MapTasks,
) -> None:
    """Settle the remaining boundaries from the pairs of their prefixes: the prefix [c] and place [c] of each."""
    keys, shard, row = places
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
    recipe: Recipe, search: Search, shards: Sequence[ScoreShard]
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
