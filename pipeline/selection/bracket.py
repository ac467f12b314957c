"""A guess, from a sample of row groups, between which keys the cut of a single ranking lies; one pass then finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np

from pipeline.arrays import Int64, UInt32
from pipeline.selection.keys import KEY_BITS
from pipeline.selection.quotas import count_of
from pipeline.selection.recipe import Judged, OpenShard, Recipe
from pipeline.selection.scan import ScoreShard
from pipeline.selection.tasks import MapTasks, chunks

#: Pairs that a cut is guessed from (a thirty-second of all, if that is less), and from at most how many shards.
SAMPLE, SHARE, SHARDS = 1 << 20, 32, 64
#: Standard errors by which the cut may be off the sample's quantile; one that is off by more is found in other ways.
ERRORS = 6.0

#: Keys, shards and rows of some pairs [c].
Places = tuple[UInt32, Int64, Int64]


@dataclass(frozen=True)
class Bracket:
    """Keys from `low` to `high`, between which a cut is expected. A task catches at most `most` pairs."""

    low: int
    high: int
    most: int


@dataclass
class Caught:
    """Of some pairs, how many keys lie above a bracket, and those within it; None once they are too many."""

    above: int = 0
    parts: list[Places] | None = field(default_factory=list)
    count: int = 0

    def look(self, bracket: Bracket, judged: Judged, shard: int) -> None:
        """Look at judged rows of shard number `shard`."""
        self.above += int(np.count_nonzero(judged.keys > bracket.high))
        rows = np.flatnonzero((judged.keys >= bracket.low) & (judged.keys <= bracket.high))
        self._take([(judged.keys[rows], np.full(len(rows), shard), judged.places()[rows])], len(rows), bracket.most)

    def add(self, other: Caught, most: int) -> None:
        """Add what `other` has caught, at most `most` in all."""
        self.above += other.above
        self._take(other.parts, other.count, most)

    def _take(self, parts: list[Places] | None, count: int, most: int) -> None:
        self.count += count
        if self.parts is None or parts is None or self.count > most:
            self.parts = None
        else:
            self.parts += parts

    def places(self, rank: int) -> Places | None:
        """The pairs caught, if the pair at `rank` (from 1) of the whole ranking is one of them."""
        if self.parts is None or not self.above < rank <= self.above + self.count:
            return None
        keys, shard, row = (np.concatenate([part[column] for part in self.parts]) for column in range(3))
        return keys, shard, row


def guess(
    recipe: Recipe, shards: Sequence[ScoreShard], keep: float | int, collect: int, map_tasks: MapTasks
) -> Bracket | None:
    """The bracket of the cut that keeps a fraction or count of the pairs; None where the ranking is not a single one.

    Where there are no more than `collect` rows, the bracket holds all of them.
    """
    if recipe.strata > 1:
        return None
    rows = sum(shard.rows for shard in shards)
    most = 4 * collect // max(len(chunks(shards)), 1)
    everything = Bracket(0, (1 << KEY_BITS) - 1, most)
    if rows <= collect:
        return everything
    chosen = [shards[place] for place in np.unique(np.linspace(0, len(shards) - 1, SHARDS).astype(int))]
    each = min(SAMPLE, rows // SHARE) // len(chosen)
    found = [part for task in map_tasks(partial(_sample, recipe, each), chunks(chosen)) for part in task]
    scored, seen = (sum(part[column] for part in found) for column in (1, 2))
    keys = np.sort(np.concatenate([part[0] for part in found]))[::-1]
    if len(keys) == 0:
        return None
    rank = min(count_of(keep, scored) if isinstance(keep, float) else round(keep / rows * seen), len(keys))
    error = int(ERRORS * np.sqrt(max(rank * (1 - rank / len(keys)), 1.0)))
    low = int(keys[rank + error]) if rank + error < len(keys) else everything.low
    high = int(keys[rank - error]) if rank - error >= 0 else everything.high
    return Bracket(low, high, most)


def _sample(recipe: Recipe, rows: int, shards: Sequence[ScoreShard]) -> list[tuple[UInt32, int, int]]:
    """Of row groups of together about `rows` rows, evenly spread over each shard: keys, pairs that scored, and rows."""
    found = []
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            spans = list(opened.file.spans(rows=1))
            wanted = max(rows * len(spans) // max(shard.rows, 1), 1)
            for span in islice(spans, 0, None, max(len(spans) // wanted, 1)):
                judged = opened.judge(span)
                found.append((judged.keys, judged.scored, span.rows))
    return found
