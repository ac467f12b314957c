"""Regrouping: rows come to their buckets in order, and values back to their shards, whatever the number of files."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import SelectConfig
from pipeline.selection import layers, prepare, regroup, runs, scan
from pipeline.store import storage
from tests.selection.scores import pickling_map, row, write_run

ROW = [("place", "i8")]


def put_in(into: runs.Runs, buckets: np.ndarray, step: int) -> None:
    for start in range(0, len(buckets), step):
        part = buckets[start : start + step]
        rows = np.zeros(len(part), dtype=ROW)
        rows["place"] = np.arange(start, start + len(part))
        into.add(rows, part)


@pytest.mark.parametrize("piece_rows", [1, 7, 50, 10**6])
@pytest.mark.parametrize("run_rows", [1, 20, 60, 10**6])
def test_rows_come_back_by_bucket_in_the_order_they_were_put_in(tmp_path, monkeypatch, run_rows, piece_rows):
    monkeypatch.setattr(runs, "RUN_ROWS", run_rows)
    monkeypatch.setattr(runs, "PIECE_ROWS", piece_rows)
    buckets = np.random.default_rng(0).integers(2, 17, 200)
    buckets[buckets == 5] = 6  # empty ones at the beginning, in between and at the end
    with runs.Runs(str(tmp_path), "name", 20) as made:
        put_in(made, buckets, 9)
        pieces = dict(made.pieces())
        assert any(tmp_path.rglob("*.npy")) == (run_rows < 200)
    assert not any(tmp_path.rglob("*.npy"))
    assert made.counts.tolist() == np.bincount(buckets, minlength=20).tolist()
    assert np.concatenate(list(pieces.values()))["place"].tolist() == np.argsort(buckets, kind="stable").tolist()
    number, start = runs.layout(made.counts)
    for bucket in np.flatnonzero(made.counts):
        found = pieces[number[bucket]]["place"][start[bucket] : start[bucket] + made.counts[bucket]]
        assert found.tolist() == np.flatnonzero(buckets == bucket).tolist()
    largest = int(made.counts.max())
    assert all(len(piece) < piece_rows + largest for piece in pieces.values())


def test_runs_of_a_task_that_fails_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUN_ROWS", 10)
    with pytest.raises(ValueError, match="negative"), runs.Runs(str(tmp_path), "name", 3) as made:
        put_in(made, np.append(np.zeros(100, np.int64), -1), 5)
    assert not any(tmp_path.rglob("*.npy"))


def test_no_rows_make_no_piece(tmp_path):
    with runs.Runs(str(tmp_path), "name", 3) as made:
        assert list(made.pieces()) == []


def rows_of(opened, judged):
    """Every row in bucket `row % 3`, and those whose row is a multiple of 4 in bucket 4, too; none in bucket 3."""
    places = judged.places()
    chosen = np.concatenate([np.arange(len(places)), np.flatnonzero(places % 4 == 0)])
    made = regroup.place_rows(judged, opened.shard.index, chosen, [])
    return made, np.where(np.arange(len(chosen)) < len(places), made["row"] % 3, 4)


def value_of(rows):
    """A value of each row that says who it is; in bucket 4, where rows are multiples of 4, one more."""
    assert (np.diff(rows["shard"].astype(np.int64) * 1000 + rows["row"]) > 0).all()
    return rows["shard"] * 100.0 + rows["row"] + (len(set((rows["row"] % 3).tolist())) > 1)


@pytest.mark.parametrize("size", [3, 10**6])
@pytest.mark.parametrize("count", [1, 90])
def test_values_come_back_to_their_rows(tmp_path, monkeypatch, count, size):
    monkeypatch.setattr(runs, "RUN_ROWS", size)
    monkeypatch.setattr(runs, "PIECE_ROWS", size)
    lengths = [(7 * number) % 11 + (number == 0) * 20 for number in range(count)]
    scores = [[row(100 * n + at, 1.0 if at != 6 else None) for at in range(length)] for n, length in enumerate(lengths)]
    shards = scan.committed_shards(write_run(tmp_path, scores))[0]
    recipe = prepare.make_recipe(SelectConfig(), shards[0], 0, str(tmp_path / "scratch"))
    regrouped = regroup.regroup(recipe, shards, "made", 5, rows_of, pickling_map)
    assert len(regrouped.counts) == min(count, 64)
    regroup.evaluate_buckets(regrouped, value_of, pickling_map)
    regroup.bring_back(regrouped, "layer", -1.0, "f4", pickling_map)
    for number, length in enumerate(lengths):
        expected = [-1.0 if at == 6 else number * 100 + at + (at % 4 == 0) for at in range(length)]
        assert layers.read(recipe.scratch, "layer", number).tolist() == expected


def test_files_grow_with_the_buckets_not_with_the_shards(tmp_path, monkeypatch):
    shards = scan.committed_shards(write_run(tmp_path, [[row(n, 1.0)] * 5 for n in range(150)]))[0]
    recipe = prepare.make_recipe(SelectConfig(), shards[0], 0, str(tmp_path / "scratch"))
    regrouped = regroup.regroup(recipe, shards, "made", 5, rows_of, map)
    opened: list[str] = []
    read = storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda url: opened.append(url) or read(url))
    regroup.evaluate_buckets(regrouped, value_of, map)
    assert len(opened) == 64 * 4
    opened.clear()
    regroup.bring_back(regrouped, "layer", -1.0, "f4", map)
    assert len(opened) == 64 * (4 + 1)
