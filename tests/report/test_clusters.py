"""Clusters in the report: planted kinds of images are found, with what is kept of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.report import clusters
from pipeline.report.clusters import find_clusters
from pipeline.store.scores import embedding_column
from tests.report.synthetic import DIMENSION, Made, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("clusters"), shards=4, samples=50, extras=False)


def plant(made: Made, kinds: int) -> None:
    """Give pair number `i` the image embedding of kind `i % kinds`; one scored pair loses its embedding."""
    rng = np.random.default_rng(1)
    centres = np.eye(DIMENSION)[:kinds]
    for shard, table in enumerate(made.tables):
        images = centres[np.arange(len(table)) % kinds] + 0.05 * rng.normal(size=(len(table), DIMENSION))
        vectors = np.concatenate([images, rng.normal(size=images.shape)], axis=1).astype(np.float16)
        rows = np.arange(1 if shard == 1 else 0, len(table))
        column = embedding_column(vectors[rows], rows, len(table))
        planted = table.set_column(table.column_names.index("embedding"), "embedding", column)
        pq.write_table(planted, made.run.score_file(shard), row_group_size=20)


def test_planted_kinds_are_the_clusters(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "MOST", 4)
    plant(made, kinds=4)
    places = [(shard, index) for shard in range(4) for index in range(50)]
    found = find_clusters(made.run, made.inventory, "default", places, seed=3)
    assert found is not None
    scored = np.concatenate([np.asarray(table["status"].to_pylist()) == "ok" for table in made.tables])
    scored[50] = False
    kept = set()
    for shard in range(4):
        listed = pq.read_table(Path(made.run.selection()) / "keep" / f"{shard:05d}.parquet", columns=["index"])
        kept |= {(shard, index) for index in listed["index"].to_pylist()}
    assert [group.name for group in found.groups] == [1, 2, 3, 4]
    assert sum(group.pairs for group in found.groups) == scored.sum()
    for group in found.groups:
        kind = group.example[1] % 4
        mine = [place for place, ok in zip(places, scored, strict=True) if ok and place[1] % 4 == kind]
        assert (group.pairs, group.kept) == (len(mine), len(kept & set(mine)))
        assert {found.of_pair[place] for place in mine} == {group.name}
    assert (1, 0) not in found.of_pair


def test_a_sample_is_bounded_and_seeded(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(made, kinds=4)
    monkeypatch.setattr(clusters, "SAMPLE", 120)
    first, again = (find_clusters(made.run, made.inventory, "default", [(0, 9)], seed=3) for _ in range(2))
    assert first == again
    assert first is not None
    assert 80 < sum(group.pairs for group in first.groups) <= 120


def test_scores_without_embeddings_have_no_clusters(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=50, extras=False)
    for shard, table in enumerate(made.tables):
        pq.write_table(table.drop_columns(["embedding"]), made.run.score_file(shard))
    assert find_clusters(made.run, made.inventory, "default", [(0, 9)], seed=0) is None


def test_too_few_pairs_have_no_clusters(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=60, extras=False)
    assert isinstance(made.tables[0], pa.Table)
    assert find_clusters(made.run, made.inventory, "default", [(0, 9)], seed=0) is None
