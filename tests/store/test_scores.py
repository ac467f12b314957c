"""Score files: readable everywhere, the same bytes for the same rows, committed whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.inventory import write_inventory
from pipeline.run import RunFolder
from pipeline.store import commits, storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import ROW_GROUP_ROWS, embedding_column, score_schema, score_table, serialise
from tests.engine.fakes import FINGERPRINT, fake_table, shard_infos

SHARD = shard_infos(3, samples=20)[1]


def with_embedding(table: pa.Table, size: int = 8) -> pa.Table:
    rows = np.flatnonzero(np.array(table["status"].to_pylist()) == "ok")
    values = np.arange(len(rows) * size, dtype=np.float16).reshape(len(rows), size)
    columns = {name: table[name].combine_chunks() for name in table.schema.names}
    return score_table(columns, embedding_column(values, rows, table.num_rows))


def commit(run: RunFolder, table: pa.Table, fingerprint: Fingerprint = FINGERPRINT) -> commits.ScoreMark:
    return commits.commit_scores(
        run, SHARD, table, fingerprint, estimator="fake", seconds={"score": 1.0}, finished=12.5, worker="3"
    )


def test_a_mark_says_what_was_committed_where_when_and_by_whom(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    mark = commits.commit_scores(
        run, SHARD, fake_table(SHARD), FINGERPRINT, estimator="fake", seconds={"load": 0.12345, "score": 2.0},
        finished=12.34567, worker="3", end_error="cut at byte 7",
    )  # fmt: skip
    (read,) = commits.read_marks(run)
    assert read == mark
    assert (mark.shard, mark.url, mark.end_error, mark.worker) == (SHARD.index, SHARD.url, "cut at byte 7", "3")
    assert (mark.seconds, mark.finished) == ({"load": 0.1235, "score": 2.0}, 12.346)
    assert mark.checksum == storage.file_checksum(run.score_file(SHARD.index))
    assert mark.statuses == {"ok": 18, "no-image": 2}


def test_equal_tables_give_equal_bytes_whatever_their_chunks() -> None:
    table = with_embedding(fake_table(SHARD))
    pieces = pa.concat_tables([table.slice(0, 5), table.slice(5, 0), table.slice(5)])
    assert serialise(pieces, estimator="fake", fingerprint="f") == serialise(table, estimator="fake", fingerprint="f")


def test_row_groups_carry_statistics_and_the_file_its_provenance() -> None:
    data = serialise(fake_table(shard_infos(1, samples=10_000)[0]), estimator="fake", fingerprint="f")
    file = pq.ParquetFile(pa.BufferReader(data))
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 1808]
    utility = file.schema_arrow.get_field_index("utility")
    assert file.metadata.row_group(0).column(utility).statistics.has_min_max
    assert file.metadata.row_group(0).column(utility).compression == "ZSTD"
    found = {key: file.metadata.metadata[key] for key in (b"estimator", b"fingerprint", b"schema_version")}
    assert found == {b"estimator": b"fake", b"fingerprint": b"f", b"schema_version": b"2"}


def test_four_readers_read_it_unaided(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "00001.parquet"
    table = with_embedding(fake_table(SHARD))
    path.write_bytes(serialise(table, estimator="fake", fingerprint="f"))
    expected = table["utility"].to_pylist()
    assert expected[6] is None
    embedding = table["embedding"].to_pylist()[1]

    (row,) = duckdb.sql(f"select utility, embedding, terms from '{path}' where index = 1").fetchall()
    assert (row[0], list(row[1]), sum(row[2])) == (expected[1], embedding, pytest.approx(table["score"][1].as_py()))
    frame = pd.read_parquet(path)
    assert frame["utility"].isna().tolist() == [value is None for value in expected]
    assert frame["embedding"][6] is None
    polars = pl.read_parquet(path)
    assert polars["utility"].to_list() == expected
    assert polars["embedding"][1].to_list() == embedding
    loaded = datasets.load_dataset(
        "parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train", verification_mode="no_checks"
    )
    assert list(loaded["utility"]) == expected


def test_a_table_of_other_columns_is_refused() -> None:
    columns = {name: fake_table(SHARD)[name].combine_chunks() for name in score_schema().names}
    with pytest.raises(ValueError, match="expected a value in each row"):
        score_table({**columns, "status": pa.nulls(20, pa.string())})
    del columns["uid"]
    with pytest.raises(ValueError, match="score columns"):
        score_table(columns)


def test_commit_writes_file_and_mark_that_agree(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    mark = commit(run, fake_table(SHARD))
    assert list(commits.read_marks(run)) == [mark]
    assert (mark.rows, mark.ok, mark.reasons) == (20, 18, {"no-image": 2})
    assert storage.file_checksum(run.score_file(1)) == mark.checksum
    assert storage.size(run.score_file(1)) == mark.bytes
    assert mark.parts["shard"] == {"name": "00001.tar", "bytes": 101, "etag": "e1"}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["00001.json", "00001.parquet"]


def test_a_file_without_a_mark_and_a_mark_without_a_file_are_no_result(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    commit(run, fake_table(SHARD))
    storage.write_bytes(run.score_file(2), b"torn")
    storage.write_bytes(run.score_mark(0), Path(run.score_mark(1)).read_bytes())
    assert [mark.shard for mark in commits.read_marks(run)] == [1]
    assert commits.open_scores(run).count_rows() == 20
    Path(run.score_file(1)).unlink()
    assert list(commits.read_marks(run)) == []
    assert commits.open_scores(run).count_rows() == 0


def test_scores_of_a_shard_that_left_the_input_or_changed_do_not_count(tmp_path: Path) -> None:
    run, shards = RunFolder(str(tmp_path)), shard_infos(3, samples=20)
    for shard in shards:
        commits.commit_scores(
            run, shard, fake_table(shard), FINGERPRINT, estimator="fake", seconds={}, finished=0.0
        )  # fmt: skip
    write_inventory(run.inventory, shards)
    assert [mark.shard for mark in commits.read_marks(run)] == [0, 1, 2]
    write_inventory(run.inventory, [replace(shards[0], etag="another"), shards[1]])
    assert [mark.shard for mark in commits.read_marks(run)] == [1]
    commits.remove_strangers(run, 2)
    assert [Path(url).name for url in storage.list_files(run.scores)] == [
        "00000.json", "00000.parquet", "00001.json", "00001.parquet"
    ]  # fmt: skip


def test_replacing_results_of_other_settings_never_leaves_the_old_mark_over_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(str(tmp_path))
    commit(run, fake_table(SHARD))
    other = Fingerprint({"score": {"estimator": "other"}})

    def full(url: str, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        commit(run, fake_table(SHARD, spread=2.0), other)
    assert list(commits.committed(run, [SHARD], FINGERPRINT, "refuse")) == []


def test_two_writers_of_one_shard_end_with_the_same_bytes(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    commit(run, fake_table(SHARD))
    first = Path(run.score_file(1)).read_bytes()
    commit(run, fake_table(SHARD))
    assert Path(run.score_file(1)).read_bytes() == first
    assert [mark.shard for mark in commits.committed(run, [SHARD], FINGERPRINT, "refuse")] == [1]
