"""Which pairs repeat others: exactly, by content hash, or nearly, by image embedding (SemDeDup, arXiv 2303.09540).

Of pairs that repeat each other the one that ranks highest stays. Near-duplicates are searched within the parts of
clusters; a pair close to a border visits the part beyond it, too, and is compared with the residents there. A pair goes
when a better one above the cosine threshold stays in the same part; that one may in turn go for a better one in another
part, so each pair that goes is linked by near-duplicates to one that stays.

Most comparisons are settled in `SKETCH` dimensions. With `P` an orthonormal projection and `r` what it leaves of a
vector's length, the cosine of unit vectors is at most `Px . Py + r_x r_y` (Cauchy and Schwarz on the rest), so only
pairs with this bound above the threshold are compared in full: nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from pipeline.arrays import Bool, Float32, Int64, UInt8
from pipeline.selection.clusters import unit
from pipeline.selection.keys import parse_uids
from pipeline.selection.recipe import DUPLICATE, Judged, OpenShard, Recipe
from pipeline.selection.regroup import best_first, bring_back, by_part, evaluate_buckets, place_rows, regroup
from pipeline.selection.runs import Rows
from pipeline.selection.scan import ScoreShard
from pipeline.selection.tasks import MapTasks

#: Pairs of a bucket of content hashes (36 bytes each).
BUCKET_PAIRS = 1 << 22
#: Pairs that a part should have: larger parts take more comparisons, but have fewer visitors.
PART_PAIRS = 1 << 14
#: Rows compared at a time with this many times as many.
BLOCK, WIDTH = 1024, 4
#: Dimensions in which pairs are compared first; fewer than this many rows are compared in full at once.
SKETCH, FEW = 32, 512
#: With more than one in so many pairs above the bound, comparing all in full is faster.
DENSE = 256
#: Cosines of unit vectors in float32, and their bounds, are off by less than this.
ROUNDING, BOUND_ROUNDING = 1e-6, 1e-5


def find_exact(recipe: Recipe, shards: Sequence[ScoreShard], pairs: int, map_tasks: MapTasks) -> Recipe:
    """Mark the `pairs` whose content another pair of higher rank has, too (layer `duplicate`)."""
    buckets = -(-pairs // BUCKET_PAIRS) or 1
    regrouped = regroup(recipe, shards, "content", buckets, partial(_content_rows, buckets), map_tasks)
    evaluate_buckets(regrouped, exact_duplicates, map_tasks)
    bring_back(regrouped, DUPLICATE, 0, "u1", map_tasks)
    return recipe.with_layer(DUPLICATE)


def border_margin(cosine: float) -> float:
    """How near to a border (see `write_parts`) a pair must lie to be compared with pairs beyond it, too.

    Two unit vectors at this cosine are `sqrt(2 - 2 cosine)` apart, and one of them is within half of that of any border
    between them. That takes the line across the border; 0.35 misses 1 in 10,000 of real embeddings that vary in eight
    dimensions, and fewer in more.
    """
    return 0.35 * float(np.sqrt(2.0 - 2.0 * cosine))


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
    """1 for each row [n] within `cosine` of a better row of its part that stays, else 0.

    Rows that are not `home` are visitors of their part; two visitors are not compared.
    """
    result = np.zeros(len(rows), dtype=np.uint8)
    for members in by_part(rows):
        vectors = unit(rows["embedding"][members].astype(np.float32))
        result[members[_greedy(vectors, rows["home"][members], cosine - ROUNDING)]] = 1
    return result


def _greedy(vectors: Float32, home: Bool, cosine: float) -> Bool:
    """Which of the unit vectors [n, d], best first, lie above `cosine` of one before them that was not dropped."""
    dropped = np.zeros(len(vectors), dtype=bool)
    sketches = _sketches(vectors) if len(vectors) >= FEW and vectors.shape[1] > 2 * SKETCH else None
    for start in range(0, len(vectors), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(vectors)))
        before = np.flatnonzero(~dropped[: block[-1] + 1])
        found = [
            _near(vectors, sketches, left, right[place : place + WIDTH * BLOCK], cosine)
            for left, right in ((block[home[block]], before), (block[~home[block]], before[home[before]]))
            for place in range(0, len(right) or 1, WIDTH * BLOCK)
        ]
        worse, better = (np.concatenate([pair[side] for pair in found]) for side in (0, 1))
        order = np.argsort(worse, kind="stable")
        places, starts = np.unique(worse[order], return_index=True)
        for place, others in zip(places, np.split(better[order], starts)[1:], strict=True):
            dropped[place] = not dropped[others].all()
    return dropped


def _near(vectors: Float32, sketches: Float32 | None, left: Int64, right: Int64, cosine: float) -> tuple[Int64, Int64]:
    """The pairs of one of `left` and one of `right` before it whose cosine is above `cosine`."""
    above = None if sketches is None else sketches[left] @ sketches[right].T > cosine - BOUND_ROUNDING
    if above is None or np.count_nonzero(above) * DENSE > above.size:
        row, column = _places(vectors[left] @ vectors[right].T > cosine)
    else:
        row, column = _places(above)
        near = np.einsum("ij,ij->i", vectors[left[row]], vectors[right[column]]) > cosine
        row, column = row[near], column[near]
    first, second = left[row], right[column]
    earlier = second < first
    return first[earlier], second[earlier]


def _places(mask: Bool) -> tuple[Int64, Int64]:
    """Rows and columns of the true entries; several times faster than `np.nonzero` where they are few."""
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return row, column


def _sketches(vectors: Float32) -> Float32:
    """What bounds the cosines of unit vectors [n, d] by their inner products: projections on about their leading
    subspace (one step of a randomised subspace iteration) and the length of what is left [n, SKETCH + 1]."""
    start = np.random.default_rng(0).normal(size=(vectors.shape[1], SKETCH)).astype(np.float32)
    basis, _ = np.linalg.qr(vectors.T @ (vectors @ start))
    inside = vectors @ basis
    left = np.einsum("ij,ij->i", vectors, vectors) - np.einsum("ij,ij->i", inside, inside)
    # The two sums differ by rounding: what is added is more than that, and the bound stays one.
    return np.column_stack([inside, np.sqrt(np.maximum(left, 0) + np.float32(1e-6))])


def _content_rows(buckets: int, opened: OpenShard, judged: Judged) -> tuple[Rows, Int64]:
    column = judged.span.arrow("content")
    if judged.rows is not None:
        column = column.take(judged.rows)
    rows = place_rows(
        judged, opened.shard.index, np.arange(len(judged.value)), [("content_high", "u8"), ("content_low", "u8")]
    )
    rows["content_high"], rows["content_low"] = parse_uids(column, f"{opened.shard.url} (content)")
    return rows, ((rows["content_high"] >> np.uint64(32)).astype(np.int64) * buckets) >> 32
