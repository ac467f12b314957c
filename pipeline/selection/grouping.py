"""The groups that quotas are shared out over: frequent captions, or clusters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from pipeline.arrays import Bool, Int64
from pipeline.selection.keys import sum_equal
from pipeline.selection.recipe import OpenShard, Recipe, caption_ids
from pipeline.selection.scan import ScoreShard
from pipeline.selection.tasks import MapTasks, chunks

#: A caption is a group of its own from this many pairs on, and from this share of all pairs on.
MIN_PAIRS, MIN_SHARE = 10, 1 / 32768
#: Counters that captions are hashed into, in each of two tables, to find the frequent ones in bounded memory.
BUCKET_BITS = 18


def frequent_captions(recipe: Recipe, shards: Sequence[ScoreShard], map_tasks: MapTasks) -> Int64:
    """The ids of the frequent captions among the pairs that can be kept, sorted (two passes).

    Only captions whose two hashed counters both reach the bar are counted one by one, so memory is bounded by the
    number of frequent captions, not by that of all captions.
    """
    tables = np.zeros((2, 1 << BUCKET_BITS), dtype=np.int64)
    for part in map_tasks(partial(_hashed_counts, recipe), chunks(shards)):
        tables += part
    bar = max(MIN_PAIRS, int(tables[0].sum() * MIN_SHARE))
    heavy = tables >= bar
    ids, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for part in map_tasks(partial(_caption_counts, recipe, heavy), chunks(shards)):
        ids, counts = sum_equal(np.concatenate([ids, part[0]]), np.concatenate([counts, part[1]]))
    return ids[counts >= bar]


def _buckets(ids: Int64) -> tuple[Int64, Int64]:
    """Two counters per caption: `ids` are hashes already, so different bits of them are independent."""
    mask = (1 << BUCKET_BITS) - 1
    return ids & mask, (ids >> 32) & mask


def _eligible_captions(recipe: Recipe, shard: ScoreShard) -> list[Int64]:
    with OpenShard(recipe, shard) as opened:
        found = []
        for judged in opened.judged():
            ids = caption_ids(judged.span)
            found.append(ids if judged.rows is None else ids[judged.rows])
        return found


def _hashed_counts(recipe: Recipe, shards: Sequence[ScoreShard]) -> Int64:
    tables = np.zeros((2, 1 << BUCKET_BITS), dtype=np.int64)
    for shard in shards:
        for ids in _eligible_captions(recipe, shard):
            for table, bucket in zip(tables, _buckets(ids), strict=True):
                table += np.bincount(bucket, minlength=len(table))
    return tables


def _caption_counts(recipe: Recipe, heavy: Bool, shards: Sequence[ScoreShard]) -> tuple[Int64, Int64]:
    ids, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for shard in shards:
        for found in _eligible_captions(recipe, shard):
            first, second = _buckets(found)
            found = found[heavy[0, first] & heavy[1, second]]
            ids, counts = sum_equal(np.concatenate([ids, found]), np.concatenate([counts, np.ones_like(found)]))
    return ids, counts


def group_names(recipe: Recipe) -> list[str]:
    """A name for each group of a recipe."""
    if recipe.grouping == "caption" and recipe.captions is not None:
        return [f"caption {int(item) % 2**64:016x}" for item in recipe.captions] + ["other captions"]
    if recipe.grouping == "cluster":
        return [f"cluster {number}" for number in range(recipe.clusters)]
    return ["all"]
