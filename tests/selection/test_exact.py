"""The exact cut against a plain sort in memory."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Band, SelectConfig, Threshold
from pipeline.errors import StageError
from pipeline.selection import cuts
from pipeline.selection.summary import read_summary
from pipeline.selection.tasks import thread_map
from pipeline.store import storage
from tests.selection.scores import kept, pickling_map, ranking, row, select, write_run

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 3.4e38]),
    st.floats(width=32),
)
# Few distinct uids, so that uids repeat over shards and ties have to be broken by place.
ROWS = st.tuples(st.integers(0, 12), VALUES, st.sampled_from(["ok", "ok", "ok", "corrupt-image"]))
SHARDS = st.lists(st.lists(ROWS, max_size=20), min_size=1, max_size=4)


def build(drawn):
    return [[row(number, value if status == "ok" else None, status=status) for number, value, status in rows]
            for rows in drawn]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(drawn=SHARDS, keep=st.floats(0.01, 1.0), collect=st.sampled_from([1, 1 << 21]))
def test_keeps_exactly_the_first_of_the_total_order(drawn, keep, collect):
    shards = build(drawn)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "COLLECT", collect)  # 1: every digit of the uids has to be searched
        run = write_run(Path(folder), shards)
        summary = select(run, SelectConfig(keep=keep), seed=0)
        order = ranking(shards)
        count = math.floor(keep * len(order) + 0.5)
        assert sorted(order[:count]) == kept(run)
        assert (summary.scored, summary.kept) == (len(order), count)
        assert summary.total == summary.kept + sum(summary.pruned.values()) + sum(summary.rejected.values())
        assert summary.total == sum(map(len, shards))
        not_finite = sum(e["status"] == "ok" and not math.isfinite(e["utility"]) for rows in shards for e in rows)
        assert summary.rejected.get("not-finite", 0) == not_finite


@settings(max_examples=15, deadline=None)
@given(drawn=SHARDS, low=st.floats(0, 0.5), high=st.floats(0, 0.49))
def test_band_drops_both_ends(drawn, low, high):
    shards = build(drawn)
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), shards)
        select(run, SelectConfig(keep=Band(drop_lowest=low, drop_highest=high)), seed=0)
        order = ranking(shards)
        top, bottom = (math.floor(share * len(order) + 0.5) for share in (high, low))
        assert sorted(order[top : max(len(order) - bottom, top)]) == kept(run)


@settings(max_examples=15, deadline=None)
@given(drawn=SHARDS, threshold=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_threshold_keeps_what_is_at_or_above_it(drawn, threshold):
    shards = build(drawn)
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), shards)
        select(run, SelectConfig(keep=Threshold(threshold=threshold)), seed=0)
        above = [place for place in ranking(shards) if shards[place[0]][place[1]]["utility"] >= threshold]
        assert sorted(above) == kept(run)


def test_many_equal_values_are_cut_by_uid(tmp_path):
    shards = [[row(100 * shard + place, 1.0) for place in range(100)] for shard in range(3)]
    run = write_run(tmp_path, shards)
    select(run, SelectConfig(keep=137), seed=0)
    assert kept(run) == sorted(ranking(shards)[:137])


@pytest.mark.parametrize("keep", [1.0, 1])
def test_one_pair_is_kept(tmp_path, keep):
    run = write_run(tmp_path, [[], [row(1, 0.5)], []])
    select(run, SelectConfig(keep=keep), seed=0)
    assert kept(run) == [(1, 0)]
    assert len(storage.list_files(run.selection() + "/keep", ".parquet")) == 3


def test_a_count_that_cannot_be_met_is_refused(tmp_path):
    run = write_run(tmp_path, [[row(1, 0.5), row(2, math.nan)]])
    with pytest.raises(StageError, match="2 pairs were asked for, but only 1"):
        select(run, SelectConfig(keep=2), seed=0)


def test_no_scores_is_one_line(tmp_path):
    from pipeline.run import RunFolder

    with pytest.raises(StageError, match="diffprune score"):
        select(RunFolder(str(tmp_path)), SelectConfig(), seed=0)


def test_the_same_bytes_whatever_runs_the_tasks(tmp_path):
    shards = [[row(100 * shard + place, place % 7) for place in range(50)] for shard in range(5)]
    run = write_run(tmp_path, shards)
    config = SelectConfig(keep=0.3, by="0.5 * rank(utility) + rank(index)")
    contents = []
    for name, mapper in (("a", map), ("b", thread_map), ("c", pickling_map)):
        select(run, config.model_copy(update={"name": name}), seed=0, map_tasks=mapper)
        files = storage.list_files(run.selection(name) + "/keep", ".parquet")
        contents.append([storage.read_bytes(url) for url in files])
    assert contents[0] == contents[1] == contents[2]


def test_dry_run_counts_and_writes_nothing(tmp_path):
    shards = [[row(10 * shard + place, place, source=f"{shard}.org") for place in range(10)] for shard in range(2)]
    run = write_run(tmp_path, shards)
    before = sorted(tmp_path.rglob("*"))
    dry = select(run, SelectConfig(keep=0.3), seed=0, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    done = select(run, SelectConfig(keep=0.3), seed=0)
    assert (dry.kept, dry.shards, dry.sources, dry.groups) == (done.kept, done.shards, done.sources, done.groups)
    assert {source.name: source.kept for source in done.sources} == {"0.org": 3, "1.org": 3}


def test_summary_is_read_back_and_stale_lists_go(tmp_path):
    run = write_run(tmp_path, [[row(1, 0.5), row(2, 0.25)]])
    stale = run.selection() + "/keep/00009.parquet"
    storage.write_bytes(stale, b"")
    summary = select(run, SelectConfig(keep=0.5), seed=3)
    assert read_summary(run, "default") == summary
    assert summary.threshold == 0.5
    assert not storage.exists(stale)
