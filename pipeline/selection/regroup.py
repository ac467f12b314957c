"""Looking at pairs group by group when the groups are spread over all shards, with bounded memory.

An external shuffle: one pass writes, per shard, what is needed of each row, sorted by bucket; then one task per bucket
reads its stretch of every file, works out a value per row, and writes them; a last pass brings the values back to a
layer in the order of the shards. Memory is one shard's rows, or one bucket's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.selection import layers
from pipeline.selection.keys import order_keys
from pipeline.selection.recipe import Judged, OpenShard, Recipe
from pipeline.selection.scan import ScoreShard
from pipeline.selection.tasks import MapTasks, chunks

Int64 = npt.NDArray[np.int64]
Rows = npt.NDArray[np.void]

#: What every regrouped row has: its place, and what the total order needs. `key` orders the ranked value.
PLACE: list[tuple[str, str]] = [("shard", "i4"), ("row", "i4"), ("key", "u4"), ("high", "u8"), ("low", "u8")]

#: Rows that are regrouped together: few, since they may carry embeddings.
REGROUP_ROWS = 1 << 13

#: From an open shard and judged rows to regrouped rows [k] (a row may come up in more than one bucket) and their
#: buckets [k].
MakeRows = Callable[[OpenShard, Judged], tuple[Rows, Int64]]


@dataclass(frozen=True)
class Regrouped:
    """Files of regrouped rows: `counts` [shards, buckets] says how many of each shard lie in each bucket."""

    scratch: str
    name: str
    shards: Sequence[ScoreShard]
    counts: Int64

    def load(self, bucket: int) -> Rows:
        """All rows of a bucket, by shard and row."""
        starts = self.counts[:, :bucket].sum(axis=1)
        found, filled = np.empty(0, dtype=[("row", "i4")]), 0
        for shard, start, count in zip(self.shards, starts.tolist(), self.counts[:, bucket].tolist(), strict=True):
            if count:
                part = layers.read_rows(self.scratch, self.name, shard.index, start, start + count)
                if not filled:
                    found = np.empty(int(self.counts[:, bucket].sum()), dtype=part.dtype)
                found[filled : filled + count] = part
                filled += count
        return found


def place_rows(judged: Judged, shard: int, chosen: Int64, extra: list[tuple[Any, ...]]) -> Rows:
    """Regrouped rows for the judged rows `chosen` [k], with the fields of `extra` still to be filled."""
    rows = np.zeros(len(chosen), dtype=[*PLACE, *extra])
    high, low = judged.span.uids()
    places = judged.places()[chosen]
    rows["shard"], rows["row"] = shard, places
    rows["key"] = order_keys(judged.value[chosen])
    rows["high"], rows["low"] = high[places - judged.span.start], low[places - judged.span.start]
    return rows


def best_first(rows: Rows) -> Int64:
    """The order of regrouped rows: higher key, then lower uid, then lower shard and row."""
    return np.lexsort((rows["row"], rows["shard"], rows["low"], rows["high"], ~rows["key"]))


def regroup(
    recipe: Recipe, shards: Sequence[ScoreShard], name: str, buckets: int, make_rows: MakeRows, map_tasks: MapTasks
) -> Regrouped:
    """Write the rows of every shard sorted by bucket (one pass)."""
    task = partial(_write_regrouped, recipe, name, buckets, make_rows)
    counts = [count for part in map_tasks(task, chunks(shards)) for count in part]
    return Regrouped(recipe.scratch, name, shards, np.stack(counts))


def evaluate_buckets(regrouped: Regrouped, work: Callable[[Rows], npt.NDArray[Any]], map_tasks: MapTasks) -> None:
    """Run `work` on each bucket's rows [n]; its values [n] are kept for `bring_back`."""
    for _ in map_tasks(partial(_evaluate, regrouped, work), range(regrouped.counts.shape[1])):
        pass


def bring_back(regrouped: Regrouped, layer: str, default: float, dtype: str, map_tasks: MapTasks) -> None:
    """Write layer `layer` from the buckets' values; rows in no bucket get `default`, rows in several the largest."""
    places = list(range(len(regrouped.shards)))
    for _ in map_tasks(partial(_bring_back, regrouped, layer, default, dtype), chunks(places)):
        pass


def _write_regrouped(
    recipe: Recipe, name: str, buckets: int, make_rows: MakeRows, shards: Sequence[ScoreShard]
) -> list[Int64]:
    counts = []
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            made = [make_rows(opened, judged) for judged in opened.judged(REGROUP_ROWS)]
        counts.append(np.zeros(buckets, dtype=np.int64))
        if made:
            rows, bucket = (np.concatenate([part[half] for part in made]) for half in (0, 1))
            layers.write(recipe.scratch, name, shard.index, rows[np.argsort(bucket, kind="stable")])
            counts[-1] += np.bincount(bucket.astype(np.int64), minlength=buckets)
    return counts


def _evaluate(regrouped: Regrouped, work: Callable[[Rows], npt.NDArray[Any]], bucket: int) -> None:
    rows = regrouped.load(bucket)
    if len(rows):
        layers.write(regrouped.scratch, f"{regrouped.name}-values", bucket, work(rows))


def _bring_back(regrouped: Regrouped, layer: str, default: float, dtype: str, places: Sequence[int]) -> None:
    before = np.cumsum(regrouped.counts, axis=0) - regrouped.counts
    for place in places:
        shard = regrouped.shards[place]
        result = np.full(shard.rows, default, dtype=dtype)
        if regrouped.counts[place].any():
            rows = layers.read(regrouped.scratch, regrouped.name, shard.index)["row"]
            start = 0
            for bucket in np.flatnonzero(regrouped.counts[place]):
                first, count = int(before[place, bucket]), int(regrouped.counts[place, bucket])
                name = f"{regrouped.name}-values"
                values = layers.read_rows(regrouped.scratch, name, int(bucket), first, first + count)
                np.maximum.at(result, rows[start : start + count], values.astype(dtype))
                start += count
        layers.write(regrouped.scratch, layer, shard.index, result)
