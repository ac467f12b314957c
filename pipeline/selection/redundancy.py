"""What a pair adds to those already chosen: InfoMax's score, and two ways of choosing among ties.

Each works within a part of a cluster on unit embeddings and gives every pair a preference such that one exact cut of
the preferences over all parts is the choice: greedy gains never rise from one pick to the next, so cutting them at any
count is the greedy choice of that many.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from pipeline.arrays import Bool, Float32, Float64, Int64
from pipeline.selection.recipe import HELPFUL, TIE
from pipeline.selection.regroup import by_part
from pipeline.selection.runs import Rows

#: Nearest neighbours of a pair in the graph of a part.
NEIGHBOURS = 10
#: Pairs whose distances are held in memory at a time.
MOST_PAIRS = 8192
BLOCK = 1024


def infomax(rows: Rows, redundancy: float) -> Float32:
    """The marginal gain of each row [n] when its part is chosen greedily by InfoMax's objective (ICLR 2025).

    The objective is the sum of standardised values minus `redundancy` times the similarities of chosen neighbours in
    the graph of `NEIGHBOURS` nearest neighbours; negative similarities count as none.
    """

    def gains(members: Int64, vectors: Float32) -> Float32:
        return _greedy_gains(rows["value"][members].astype(np.float64), _neighbours(vectors), redundancy)

    return _in_each_part(rows, gains)


def representative(rows: Rows) -> Float32:
    """Minus the fractional rank of each tie [n] by its distance from the mean of its part, so that a cut takes the same
    share of every part, the most typical pairs first."""

    def rank(members: Int64, vectors: Float32) -> Float32:
        ties = rows["tier"][members] == TIE
        centre = vectors.mean(axis=0)
        result = np.zeros(len(members), dtype=np.float32)
        order = np.argsort(-(vectors[ties] @ centre), kind="stable")
        places = np.empty(len(order))
        places[order] = np.arange(len(order))
        result[ties] = -(places + 0.5) / max(len(order), 1)
        return result

    return _in_each_part(rows, rank)


def diverse(rows: Rows) -> Float32:
    """The distance of each tie [n] to the nearest pair chosen before it, by farthest-first traversal of its part.

    The helpful pairs of the part count as chosen; without any, the traversal starts at the most typical tie.
    """

    def distance(members: Int64, vectors: Float32) -> Float32:
        result = np.zeros(len(members), dtype=np.float32)
        for chunk in _chunks(vectors):
            result[chunk] = _farthest_first(vectors[chunk], rows["tier"][members[chunk]] == HELPFUL)
        return result

    return _in_each_part(rows, distance)


def _in_each_part(rows: Rows, work: Callable[[Int64, Float32], Float32]) -> Float32:
    """Run `work(members, vectors)` on the rows of each part, best first."""
    result = np.zeros(len(rows), dtype=np.float32)
    for members in by_part(rows):
        result[members] = work(members, rows["embedding"][members].astype(np.float32))
    return result


def _chunks(vectors: Float32) -> list[Int64]:
    """Rows of a part in pieces that fit, cut across the direction of its first pair from its mean."""
    pieces = -(-len(vectors) // MOST_PAIRS)
    if pieces == 1:
        return [np.arange(len(vectors))]
    along = vectors @ (vectors[0] - vectors.mean(axis=0))
    return [np.sort(piece) for piece in np.array_split(np.argsort(along, kind="stable"), pieces)]


def _farthest_first(vectors: Float32, chosen: Bool) -> Float32:
    similarity = vectors @ vectors.T
    gains = np.full(len(vectors), 2.0, dtype=np.float32)
    if chosen.any():
        nearest = similarity[:, chosen].max(axis=1)
    else:
        nearest = np.full(len(vectors), -1.0, dtype=np.float32)
        first = int(np.argmax(vectors @ vectors.mean(axis=0)))
        chosen = chosen.copy()
        chosen[first] = True
        nearest = np.maximum(nearest, similarity[first])
    left = ~chosen
    nearest = np.where(left, nearest, np.inf).astype(np.float32)
    for _ in range(int(left.sum())):
        pick = int(np.argmin(nearest))
        gains[pick] = 1.0 - nearest[pick]
        np.maximum(nearest, similarity[pick], out=nearest)
        nearest[pick] = np.inf
    return gains


def _neighbours(vectors: Float32) -> list[list[tuple[int, float]]]:
    """The symmetric graph of nearest neighbours: for each row its neighbours and their similarities above 0."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    graph: list[dict[int, float]] = [{} for _ in range(len(vectors))]
    if count > 0:
        for start in range(0, len(vectors), BLOCK):
            similarity = vectors[start : start + BLOCK] @ vectors.T
            rows = np.arange(len(similarity))
            similarity[rows, start + rows] = -2.0
            nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
            for row, near in zip(rows.tolist(), nearest, strict=True):
                for other in near.tolist():
                    weight = float(similarity[row, other])
                    if weight > 0:
                        graph[start + row][other] = graph[other][start + row] = weight
    return [sorted(edges.items()) for edges in graph]


def _greedy_gains(values: Float64, graph: list[list[tuple[int, float]]], redundancy: float) -> Float32:
    gains = values.tolist()
    picked = np.full(len(values), np.nan, dtype=np.float32)
    heap = [(-gain, place) for place, gain in enumerate(gains)]
    heapq.heapify(heap)
    done = [False] * len(gains)
    while heap:
        negative, place = heapq.heappop(heap)
        if done[place]:
            continue
        if -negative > gains[place]:
            heapq.heappush(heap, (-gains[place], place))
            continue
        done[place] = True
        picked[place] = gains[place]
        for other, similarity in graph[place]:
            if not done[other]:
                gains[other] -= redundancy * similarity
    return picked
