"""Looking at pairs group by group when the groups are spread over all shards, with bounded memory.

An external shuffle: one pass writes what is needed of each row, sorted by bucket over a chunk of consecutive shards;
then one task per bucket reads its stretch of every chunk, works out a value per row, and writes them; a last pass
brings the values back to a layer in the order of the shards. There are as many chunks as tasks, whatever the number of
shards. Memory is one bucket's rows, `RUN_ROWS` of them, or the value of each row of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Int64
from pipeline.selection import layers
from pipeline.selection.keys import order_keys
from pipeline.selection.recipe import Judged, OpenShard, Recipe
from pipeline.selection.runs import Rows, Runs, layout
from pipeline.selection.scan import ScoreShard
from pipeline.selection.tasks import MapTasks, chunks

#: What every regrouped row has: its place, and what the total order needs. `key` orders the ranked value.
PLACE: list[tuple[str, str]] = [("shard", "i4"), ("row", "i4"), ("key", "u4"), ("high", "u8"), ("low", "u8")]

#: Rows that are regrouped together: few, since they may carry embeddings.
REGROUP_ROWS = 1 << 13

#: From an open shard and judged rows to regrouped rows [k] (a row may come up in more than one bucket) and their
#: buckets [k].
MakeRows = Callable[[OpenShard, Judged], tuple[Rows, Int64]]


@dataclass(frozen=True)
class Regrouped:
    """Files of regrouped rows: `counts` [chunks, buckets] says how many of each chunk of shards lie in each bucket."""

    scratch: str
    name: str
    chunks: Sequence[Sequence[ScoreShard]]
    counts: Int64


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


def by_part(rows: Rows) -> Iterator[Int64]:
    """The rows of each part (field `part`), best first."""
    order = best_first(rows)
    for part in np.unique(rows["part"]):
        yield order[rows["part"][order] == part]


def regroup(
    recipe: Recipe, shards: Sequence[ScoreShard], name: str, buckets: int, make_rows: MakeRows, map_tasks: MapTasks
) -> Regrouped:
    """Write the rows of `shards`, which are sorted by index, by bucket within each chunk of them (one pass)."""
    parts = chunks(shards)
    counts = list(map_tasks(partial(_write_chunk, recipe, name, buckets, make_rows), enumerate(parts)))
    return Regrouped(recipe.scratch, name, parts, np.stack(counts))


def evaluate_buckets(regrouped: Regrouped, work: Callable[[Rows], npt.NDArray[Any]], map_tasks: MapTasks) -> None:
    """Run `work` on each bucket's rows [n], by shard and row; its values [n] are kept for `bring_back`."""
    counts = regrouped.counts
    pieces, starts = np.stack([layout(of_chunk) for of_chunk in counts], axis=1)

    def stretches(bucket: int) -> tuple[int, Int64]:
        chunk = np.flatnonzero(counts[:, bucket])
        return bucket, np.stack([chunk, *(of[chunk, bucket] for of in (pieces, starts, counts))], axis=1)

    task = partial(_evaluate, regrouped.scratch, regrouped.name, work)
    for _ in map_tasks(task, map(stretches, range(counts.shape[1]))):
        pass


def bring_back(regrouped: Regrouped, layer: str, default: float, dtype: str, map_tasks: MapTasks) -> None:
    """Write layer `layer` from the buckets' values; rows in no bucket get `default`, rows in several the largest."""
    before = np.cumsum(regrouped.counts, axis=0) - regrouped.counts
    items = enumerate(zip(regrouped.chunks, regrouped.counts, before, strict=True))
    for _ in map_tasks(partial(_bring_back, regrouped.scratch, regrouped.name, layer, default, dtype), items):
        pass


def _rows(name: str, chunk: int) -> str:
    return f"{name}/{chunk:05d}"


def _places(name: str, chunk: int) -> str:
    return f"{name}-places/{chunk:05d}"


def _values(name: str) -> str:
    return f"{name}-values"


def _first_rows(shards: Sequence[ScoreShard]) -> Int64:
    """Where the rows of each shard of a chunk begin among the chunk's, and where the last one's end."""
    return np.concatenate([[0], np.cumsum([shard.rows for shard in shards])])


def _write_chunk(
    recipe: Recipe, name: str, buckets: int, make_rows: MakeRows, item: tuple[int, Sequence[ScoreShard]]
) -> Int64:
    """Write a chunk's regrouped rows and their places among all rows of it; returns how many lie in each bucket."""
    chunk, shards = item
    with Runs(recipe.scratch, name, buckets) as runs:
        for shard in shards:
            with OpenShard(recipe, shard) as opened:
                for judged in opened.judged(REGROUP_ROWS):
                    runs.add(*make_rows(opened, judged))
        indices, firsts = np.array([shard.index for shard in shards]), _first_rows(shards)
        for piece, rows in runs.pieces():
            layers.write(recipe.scratch, _rows(name, chunk), piece, rows)
            places = firsts[np.searchsorted(indices, rows["shard"])] + rows["row"]
            layers.write(recipe.scratch, _places(name, chunk), piece, places)
        return runs.counts


def _evaluate(scratch: str, name: str, work: Callable[[Rows], npt.NDArray[Any]], item: tuple[int, Int64]) -> None:
    """Load a bucket from its stretches [k, (chunk, piece, start, count)] and work on it."""
    bucket, stretches = item
    found, filled = None, 0
    for chunk, piece, start, count in stretches.tolist():
        part = layers.read_rows(scratch, _rows(name, chunk), piece, start, start + count)
        if found is None:
            found = np.empty(int(stretches[:, 3].sum()), dtype=part.dtype)
        found[filled : filled + count] = part
        filled += count
    if found is not None:
        layers.write(scratch, _values(name), bucket, work(found))


def _bring_back(
    scratch: str,
    name: str,
    layer: str,
    default: float,
    dtype: str,
    item: tuple[int, tuple[Sequence[ScoreShard], Int64, Int64]],
) -> None:
    """Write the layer for the shards of a chunk, of which `counts` values lie in each bucket, after `before` others."""
    chunk, (shards, counts, before) = item
    firsts = _first_rows(shards)
    result = np.full(firsts[-1], default, dtype=dtype)
    piece, start = layout(counts)
    place, loaded = np.empty(0, np.int64), -1
    for bucket in np.flatnonzero(counts).tolist():
        if piece[bucket] != loaded:
            loaded = int(piece[bucket])
            place = layers.read(scratch, _places(name, chunk), loaded)
        values = layers.read_rows(scratch, _values(name), bucket, *(before[bucket] + [0, counts[bucket]]))
        mine = place[start[bucket] : start[bucket] + counts[bucket]]
        np.maximum.at(result, mine, values.astype(dtype))
    for shard, (begin, end) in zip(shards, pairwise(firsts.tolist()), strict=True):
        layers.write(scratch, layer, shard.index, result[begin:end])
