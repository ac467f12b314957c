"""Which pairs repeat others: exactly, by content hash, or nearly, by image embedding (SemDeDup, arXiv 2303.09540).

Of pairs that repeat each other the one that ranks highest stays. Near-duplicates are searched within the parts of
clusters; a pair close to a border is compared in the part beyond it, too. A pair goes when a better one above the
cosine threshold stays in the same part; that one may in turn go for a better one in another part, so each pair that
goes is linked by near-duplicates to one that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.selection.keys import parse_uids
from pipeline.selection.recipe import DUPLICATE, Judged, OpenShard, Recipe
from pipeline.selection.regroup import Int64, Rows, best_first, bring_back, evaluate_buckets, place_rows, regroup
from pipeline.selection.scan import ScoreShard
from pipeline.selection.tasks import MapTasks

#: Pairs of a bucket of content hashes (36 bytes each).
BUCKET_PAIRS = 1 << 22
#: Rows compared at a time.
BLOCK = 1024
#: Cosines of unit vectors in float32 are off by about this much.
ROUNDING = 1e-6

UInt8 = npt.NDArray[np.uint8]


def find_exact(recipe: Recipe, shards: Sequence[ScoreShard], pairs: int, map_tasks: MapTasks) -> Recipe:
    """Mark the `pairs` whose content another pair of higher rank has, too (layer `duplicate`)."""
    buckets = -(-pairs // BUCKET_PAIRS) or 1
    regrouped = regroup(recipe, shards, "content", buckets, partial(_content_rows, buckets), map_tasks)
    evaluate_buckets(regrouped, exact_duplicates, map_tasks)
    bring_back(regrouped, DUPLICATE, 0, "u1", map_tasks)
    return recipe.with_layer(DUPLICATE)


def border_margin(cosine: float) -> float:
    """How near to a border (see `write_parts`) a pair is compared beyond it.

    Two unit vectors at this cosine are `sqrt(2 - 2 cosine)` apart. That much along the line between two centroids is
    the worst case; a quarter of it is rarely exceeded in tens of dimensions or more (and finds all but a thousandth).
    """
    return 0.25 * float(np.sqrt(2.0 - 2.0 * cosine))


def exact_duplicates(rows: Rows) -> UInt8:
    """1 for each row [n] whose content a better row has, else 0."""
    rank = np.empty(len(rows), dtype=np.int64)
    rank[best_first(rows)] = np.arange(len(rows))
    order = np.lexsort((rank, rows["content_low"], rows["content_high"]))
    high, low = rows["content_high"][order], rows["content_low"][order]
    repeats = np.zeros(len(rows), dtype=np.uint8)
    repeats[order[1:]] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return repeats


def near_duplicates(rows: Rows, cosine: float) -> UInt8:
    """1 for each row [n] within `cosine` of a better row of its part that stays, else 0."""
    result = np.zeros(len(rows), dtype=np.uint8)
    order = best_first(rows)
    for part in np.unique(rows["part"]):
        members = order[rows["part"][order] == part]
        result[members[_greedy(rows["embedding"][members].astype(np.float32), cosine - ROUNDING)]] = 1
    return result


def _greedy(vectors: npt.NDArray[np.float32], cosine: float) -> npt.NDArray[np.bool_]:
    """Which of the unit vectors [n, d], best first, lie above `cosine` of one before them that was not dropped."""
    dropped = np.zeros(len(vectors), dtype=bool)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        for other in range(0, start, 4 * BLOCK):
            stop = min(other + 4 * BLOCK, start)
            near = block @ vectors[other:stop].T > cosine
            dropped[start : start + len(block)] |= (near & ~dropped[other:stop]).any(axis=1)
        near = np.tril(block @ block.T > cosine, -1)
        for place in np.flatnonzero(near.any(axis=1)):
            if not dropped[start + place]:
                dropped[start + place] = (near[place] & ~dropped[start : start + len(block)]).any()
    return dropped


def _content_rows(buckets: int, opened: OpenShard, judged: Judged) -> tuple[Rows, Int64]:
    column = judged.span.arrow("content")
    if judged.rows is not None:
        column = column.take(judged.rows)
    rows = place_rows(
        judged, opened.shard.index, np.arange(len(judged.value)), [("content_high", "u8"), ("content_low", "u8")]
    )
    rows["content_high"], rows["content_low"] = parse_uids(column, f"{opened.shard.url} (content)")
    return rows, ((rows["content_high"] >> np.uint64(32)).astype(np.int64) * buckets) >> 32
