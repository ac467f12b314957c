"""Clusters of image embeddings: spherical k-means on a seeded sample, then the cluster of every pair.

Clusters that are too large for memory are split into parts; near-duplicates are searched for in parts of their own,
which are larger. A cluster's complexity is that of Density-Based Pruning (arXiv 2401.04578): how spread out it is,
times how far it is from its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrays import Bool, Float32, Float64, Int32, Int64
from pipeline.errors import StageError
from pipeline.selection import layers
from pipeline.selection.keys import seeded_draw
from pipeline.selection.recipe import Judged, OpenShard, Recipe
from pipeline.selection.scan import ScoreShard
from pipeline.selection.tasks import MapTasks, chunks

#: Pairs that a part of a cluster should have: its pairs of pairs are looked at in memory.
PART_PAIRS = 4096
#: Clusters that k-means finds at once where only parts are wanted; beyond, these are split.
MOST_CLUSTERS = 256
#: Pairs sampled per part, and at most in all (4 bytes per dimension each).
SAMPLE_PER_PART, MAX_SAMPLE = 256, 1 << 18
ITERATIONS = 20
#: Rows whose embeddings are looked at together (4 kB each with 512 dimensions).
EMBEDDING_ROWS = 1 << 13
#: Parts that a pair is looked at in, at most: its own and the next nearest ones.
PROBES = 8
#: Neighbouring clusters that the distance between clusters is averaged over, and the softmax temperature (the paper's).
NEIGHBOURS, TEMPERATURE = 20, 0.1


@dataclass(frozen=True)
class Clusters:
    """Centroids [p, d] of the parts (unit length), the cluster of each part [p], and each cluster's complexity [k]."""

    centroids: Float32
    cluster: Int32
    complexity: Float64

    def weights(self) -> Float64:
        """Density-Based Pruning's share of each cluster [k]: the softmax of the complexities."""
        scaled = np.exp((self.complexity - self.complexity.max()) / TEMPERATURE)
        return np.asarray(scaled / scaled.sum())


def image_embeddings(opened: OpenShard, judged: Judged, chosen: Bool | None = None) -> Float32:
    """Unit-length image embeddings [c, d] of the judged rows [k], or of those `chosen` [k], from the run that
    `recipe.embeddings` names.

    The column holds image, then text; a pair without an embedding has zeros, which are near nothing.
    """
    span = judged.span
    column = span.arrow("embedding") if not opened.recipe.embeddings else opened.joined_embeddings(span)
    whole = image_half(column)
    rows = judged.places() - span.start if chosen is None else judged.places()[chosen] - span.start
    found = whole[rows].astype(np.float32)
    found[~np.asarray(column.is_valid().to_numpy(zero_copy_only=False))[rows]] = 0
    found[~np.isfinite(found).all(axis=1)] = 0
    return unit(found)


def image_half(column: pa.FixedSizeListArray) -> npt.NDArray[np.float16]:
    """The image part [n, d] of an `embedding` column, which holds image, then text; as stored, nulls included."""
    size = column.type.list_size
    flat = column.values.slice(column.offset * size, len(column) * size).to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(len(column), size)[:, : size // 2]


def unit(vectors: Float32) -> Float32:
    """Rows [n, d] at length 1; zeros stay."""
    length = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    return np.asarray(vectors / np.maximum(length, np.finfo(np.float32).tiny))


def find_clusters(
    recipe: Recipe, shards: Sequence[ScoreShard], pairs: int, count: int, part_pairs: int, map_tasks: MapTasks
) -> Clusters:
    """`count` clusters (fewer where there are fewer pairs) of the `pairs` that can be kept, from a sample of them,
    and their parts of about `part_pairs`."""
    parts = max(count, -(-pairs // part_pairs))
    share = min(1.0, min(parts * SAMPLE_PER_PART, MAX_SAMPLE) / max(pairs, 1))
    found = [part for task in map_tasks(partial(_sample, recipe, share), chunks(shards)) for part in task]
    sample = np.concatenate(found) if found else np.empty((0, 1), np.float32)
    if len(sample) == 0:
        raise StageError("select: no pair that can be kept has an embedding to cluster by")
    centroids = kmeans(sample, count, recipe.seed)
    nearest, similarity = assign(sample, centroids, 1)
    complexity = _complexity(centroids, nearest[:, 0], similarity[:, 0])
    parts_of, cluster_of = [], []
    for cluster in range(len(centroids)):
        members = sample[nearest[:, 0] == cluster]
        size = len(members) / len(sample) * pairs
        wanted = min(int(np.ceil(size / part_pairs)), len(members)) if size > 1.5 * part_pairs else 1
        split = kmeans(members, wanted, recipe.seed) if wanted > 1 else centroids[cluster : cluster + 1]
        parts_of.append(split)
        cluster_of += [cluster] * len(split)
    return Clusters(np.concatenate(parts_of), np.array(cluster_of, dtype=np.int32), complexity)


def assign(vectors: Float32, centroids: Float32, nearest: int) -> tuple[Int64, Float32]:
    """The `nearest` centroids of each vector [n, nearest] and their cosine similarities [n, nearest]."""
    import faiss  # here, since the driver loads this module too

    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    similarity, places = index.search(np.ascontiguousarray(vectors), min(nearest, len(centroids)))
    return places, similarity


def write_parts(
    recipe: Recipe, shards: Sequence[ScoreShard], clusters: Clusters, margin: float, map_tasks: MapTasks
) -> Int64:
    """Write the layers `cluster` [n] and `part` [n, PROBES or 1]; returns how many pairs each part [p] looks at.

    The first entry is a pair's own part. It visits a next nearest one (else -1) when it is not farther than `margin`
    from the border: a near-duplicate of it may lie beyond. With a margin of 0 pairs stay at home.
    """
    sizes = np.zeros(len(clusters.centroids), dtype=np.int64)
    for part in map_tasks(partial(_write_parts, recipe, clusters, margin), chunks(shards)):
        sizes += part
    return sizes


def _sample(recipe: Recipe, share: float, shards: Sequence[ScoreShard]) -> list[Float32]:
    found = []
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            for judged in opened.judged(EMBEDDING_ROWS):
                high, low = judged.span.uids()
                drawn = seeded_draw(high, low, recipe.seed + 1).astype(np.float64) < share * 2.0**64
                vectors = image_embeddings(opened, judged, drawn if judged.rows is None else drawn[judged.rows])
                found.append(vectors[vectors.any(axis=1)])
    return found


def _write_parts(recipe: Recipe, clusters: Clusters, margin: float, shards: Sequence[ScoreShard]) -> Int64:
    sizes = np.zeros(len(clusters.centroids), dtype=np.int64)
    for shard in shards:
        parts = np.full((shard.rows, PROBES if margin > 0 else 1), -1, dtype=np.int32)
        with OpenShard(recipe, shard) as opened:
            for judged in opened.judged(EMBEDDING_ROWS):
                vectors = image_embeddings(opened, judged)
                places, similarity = assign(vectors, clusters.centroids, parts.shape[1])
                own = clusters.centroids[places[:, 0]]
                parts[judged.places(), 0] = places[:, 0]
                for probe in range(1, places.shape[1]):
                    apart = np.linalg.norm(clusters.centroids[places[:, probe]] - own, axis=1)
                    near = similarity[:, 0] - similarity[:, probe] <= margin * apart
                    parts[judged.places(), probe] = np.where(near, places[:, probe], -1)
        sizes += np.bincount(parts[parts >= 0], minlength=len(sizes))
        layers.write(recipe.scratch, "part", shard.index, parts)
        layers.write(recipe.scratch, "cluster", shard.index, clusters.cluster[np.maximum(parts[:, 0], 0)])
    return sizes


def kmeans(vectors: Float32, count: int, seed: int) -> Float32:
    """Unit centroids [count, d] of spherical k-means of unit vectors [n, d]; as many as there are vectors at most."""
    import faiss

    count = min(count, len(vectors))
    means = faiss.Kmeans(
        vectors.shape[1], count, niter=ITERATIONS, spherical=True, seed=seed % 2**31, min_points_per_centroid=1
    )
    means.train(np.ascontiguousarray(vectors))
    return unit(np.asarray(means.centroids, dtype=np.float32))


def _complexity(centroids: Float32, nearest: Int64, similarity: Float32) -> Float64:
    """Mean cosine distance of a cluster's pairs to its centroid, times that of its centroid to its neighbours [k]."""
    count = len(centroids)
    members = np.maximum(np.bincount(nearest, minlength=count), 1)
    within = np.bincount(nearest, weights=1.0 - similarity, minlength=count) / members
    apart = np.sort(1.0 - centroids @ centroids.T, axis=1)[:, 1 : NEIGHBOURS + 1]
    between = apart.mean(axis=1) if count > 1 else np.ones(count)
    return np.asarray(within * between, dtype=np.float64)
