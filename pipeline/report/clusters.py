"""Clusters of image embeddings as the report shows them: what is kept of each, and where the gallery's pairs belong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.arrays import Float32
from pipeline.data.inventory import ShardInfo
from pipeline.report.contents import Place
from pipeline.report.groups import Group
from pipeline.report.rows import Bools, read_shard_rows
from pipeline.run import RunFolder
from pipeline.selection.clusters import assign, image_half, kmeans, unit
from pipeline.store import storage

#: Scored pairs that are clustered, from as few shards as hold them.
SAMPLE = 20_000
#: Clusters at most, and pairs that each should have on average.
MOST, PAIRS_EACH = 20, 40


@dataclass(frozen=True)
class Clusters:
    """Clusters of a seeded sample of the scored pairs, by size; named by number from 1.

    `groups` hold their pairs in the sample, with the most central one as the example; `of_pair` is the cluster of each
    pair asked for that has an embedding.
    """

    groups: list[Group]
    of_pair: dict[Place, int]

    @property
    def kept_share(self) -> float:
        """Kept share of the sample."""
        return sum(group.kept for group in self.groups) / sum(group.pairs for group in self.groups)


def find_clusters(
    run: RunFolder, shards: list[ShardInfo], selection: str, places: Iterable[Place], seed: int
) -> Clusters | None:
    """Cluster the image embeddings of a sample by spherical k-means, and assign the pairs at `places` (shard, index).

    None where the score files hold no embeddings, or too few pairs for two clusters.
    """
    vectors, kept, sampled = _sample(run, shards, selection, seed)
    count = min(MOST, len(vectors) // PAIRS_EACH)
    if count < 2:
        return None
    centroids = kmeans(vectors, count, seed)
    found, similarity = (column[:, 0] for column in assign(vectors, centroids, 1))
    by_size = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    numbers = np.empty(count, dtype=np.int64)
    numbers[by_size] = np.arange(1, count + 1)
    groups = []
    for cluster in by_size.tolist():
        mine = np.flatnonzero(found == cluster)
        if len(mine):
            central = sampled[mine[np.argmax(similarity[mine])]]
            example = (int(central[0]), int(central[1]))
            groups.append(Group(int(numbers[cluster]), len(mine), int(kept[mine].sum()), example))
    of_pair = {}
    for place, vector in _embeddings_at(run, places).items():
        of_pair[place] = int(numbers[assign(vector[None], centroids, 1)[0].item()])
    return Clusters(groups, of_pair)


def _sample(
    run: RunFolder, shards: list[ShardInfo], selection: str, seed: int
) -> tuple[Float32, Bools, NDArray[np.int64]]:
    """Image embeddings `[n, d]` of about `SAMPLE` scored pairs, which are kept `[n]`, and their places `[n, 2]`.

    Whole shards in a seeded order; of a shard that holds more than is wanted, evenly spaced pairs.
    """
    vectors, kept, places = [np.empty((0, 1), np.float32)], [np.empty(0, bool)], [np.empty((0, 2), np.int64)]
    wanted = SAMPLE
    for position in np.random.default_rng(seed).permutation(len(shards)).tolist():
        shard = shards[position].index
        rows = read_shard_rows(run, shard, [selection], ("index", "status", "utility", "embedding"))
        if "embedding" not in rows.table.column_names:
            break
        images, known = _images(rows.table["embedding"].combine_chunks())
        chosen = np.flatnonzero(rows.scored & known)
        chosen = chosen[:: max(1, -(-len(chosen) // wanted))]
        vectors.append(images[chosen])
        kept.append(rows.kept[0][chosen])
        places.append(np.column_stack([np.full(len(chosen), shard), rows.table["index"].to_numpy()[chosen]]))
        wanted -= len(chosen)
        if wanted <= 0:
            break
    filled = slice(1, None) if len(vectors) > 1 else slice(None)
    return np.concatenate(vectors[filled]), np.concatenate(kept), np.concatenate(places)


def _embeddings_at(run: RunFolder, places: Iterable[Place]) -> dict[Place, Float32]:
    """Image embeddings `[d]` of single pairs; of each file only the row groups that hold one are read."""
    wanted: dict[int, list[int]] = defaultdict(list)
    for shard, index in sorted(set(places)):
        wanted[shard].append(index)
    found = {}
    for shard, indices in wanted.items():
        with storage.open_read(run.score_file(shard)) as handle:
            file = pq.ParquetFile(handle)
            if "embedding" not in file.schema_arrow.names:
                return {}
            ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)])
            # A score file has a row per sample, in input order: a row's number is its index.
            groups = np.searchsorted(ends, indices, side="right")
            for group in np.unique(groups).tolist():
                column = file.read_row_group(group, columns=["embedding"])["embedding"].combine_chunks()
                images, known = _images(column)
                start = int(ends[group]) - len(images)
                for index in (i for i, g in zip(indices, groups, strict=True) if g == group and known[i - start]):
                    found[shard, index] = images[index - start]
    return found


def _images(column: pa.FixedSizeListArray) -> tuple[Float32, Bools]:
    """The image half of an `embedding` column as unit vectors `[n, d]`, and where there is one `[n]`."""
    known = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    images = image_half(column).astype(np.float32)
    known &= np.isfinite(images).all(axis=1)
    images[~known] = 0
    return unit(images), known
