"""The exact cut against a plain sort in memory."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import BalanceConfig, Band, DedupConfig, SelectConfig, Threshold
from pipeline.errors import ConfigError, InputError, StageError
from pipeline.run import RunFolder
from pipeline.selection import bracket, cuts, plan, prepare, write
from pipeline.selection import select as select_module
from pipeline.selection.bracket import Bracket, Caught, guess
from pipeline.selection.keys import order_keys
from pipeline.selection.scan import SPAN_ROWS, ScoreFile, committed_shards
from pipeline.selection.summary import read_summary, summary_file
from pipeline.selection.tasks import thread_map
from pipeline.store import storage
from tests.selection.scores import kept, pickling_map, ranking, row, select, uid, write_run

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 3.4e38]),
    st.floats(width=32),
)
# Few distinct uids, so that uids repeat over shards and ties have to be broken by place.
ROWS = st.tuples(st.integers(0, 12), VALUES, st.sampled_from(["ok", "ok", "ok", "corrupt-image"]))


def build(drawn):
    return [[row(number, value if status == "ok" else None, status=status) for number, value, status in rows]
            for rows in drawn]  # fmt: skip


def can_be_ranked(drawn):
    """Some pair has a finite value, or none has any: else the selection is refused."""
    shards = build(drawn)
    return bool(ranking(shards)) or all(entry["status"] != "ok" for rows in shards for entry in rows)


SHARDS = st.lists(st.lists(ROWS, max_size=20), min_size=1, max_size=4).filter(can_be_ranked)


@settings(max_examples=40, deadline=None)
@given(
    drawn=SHARDS,
    keep=st.floats(0.01, 1.0),
    collect=st.sampled_from([1, 15, 1 << 21]),
    span=st.sampled_from([7, SPAN_ROWS]),
)
def test_keeps_exactly_the_first_of_the_total_order(drawn, keep, collect, span):
    shards = build(drawn)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # 1: every digit of the uids has to be searched; 15: the cut is guessed from a sample, rightly or wrongly
        patch.setattr(cuts, "COLLECT", collect)
        patch.setattr(plan, "COLLECT", collect)
        patch.setattr(ScoreFile.spans, "__defaults__", (span,))  # a file is read in one or in several parts
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
    above = [place for place in ranking(shards) if shards[place[0]][place[1]]["utility"] >= threshold]
    if ranking(shards) and not above:
        return  # refused, see below
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), shards)
        summary = select(run, SelectConfig(keep=Threshold(threshold=threshold)), seed=0)
        assert sorted(above) == kept(run)
        assert summary.kept == len(above)
        assert summary.pruned.get("quota", 0) == len(ranking(shards)) - len(above)


@pytest.mark.parametrize("keep", [0.3, 1200])
def test_a_good_guess_takes_one_pass_and_a_bad_one_more(tmp_path, monkeypatch, keep):
    rng = np.random.default_rng(0)
    shards = [[row(1000 * shard + place, float(rng.normal())) for place in range(1000)] for shard in range(4)]
    run = write_run(tmp_path, shards, group_rows=50)
    monkeypatch.setattr(plan, "COLLECT", 3000)
    monkeypatch.setattr(bracket, "SHARE", 4)
    collected = []
    candidates = cuts._candidates
    monkeypatch.setattr(cuts, "_candidates", lambda *given: collected.append(1) or candidates(*given))
    select(run, SelectConfig(keep=keep), seed=0)
    assert kept(run) == sorted(ranking(shards)[:1200])
    assert not collected
    monkeypatch.setattr(plan, "guess", lambda *_: Bracket(5, 6, 100))
    select(run, SelectConfig(keep=keep), seed=0)
    assert kept(run) == sorted(ranking(shards)[:1200])
    assert collected


def test_the_guess_holds_the_cut_of_the_ranking_it_sampled(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.normal(size=4000).astype(np.float32)
    shards = [[row(place, float(value), width=int(value > 0)) for place, value in enumerate(values)], []]
    shards_of = committed_shards(write_run(tmp_path, shards, group_rows=100))[0]
    recipe = prepare.make_recipe(SelectConfig(where="width == 1"), shards_of[0], 0, "")
    found = guess(recipe, shards_of, 0.25, 1000, map)  # of all that scored, though only the positive can be kept
    keys = np.sort(order_keys(values))[::-1]
    assert found is not None
    assert 0 < found.low < keys[1000] < found.high < 2**32 - 1
    assert guess(recipe, shards_of, 0.25, 4000, map) == Bracket(0, 2**32 - 1, 4 * 4000 // 2)
    everything = guess(recipe, shards_of, 1.0, 1000, map)
    assert everything is not None
    assert everything.low == 0
    assert guess(replace(recipe, grouping="cluster", clusters=2), shards_of, 0.25, 1000, map) is None


def test_too_many_caught_are_none():
    caught = Caught(above=3)
    one = Caught(above=1, parts=[(np.zeros(4, np.uint32), np.zeros(4, np.int64), np.arange(4))], count=4)
    caught.add(one, 8)
    assert caught.places(4) is None
    found = caught.places(5)
    assert found is not None
    assert found[2].tolist() == [0, 1, 2, 3]
    assert caught.places(8) is not None
    assert caught.places(9) is None
    caught.add(one, 7)
    assert caught.above == 5
    assert caught.places(6) is None
    caught.add(one, 100)  # never again, since some were let go
    assert caught.places(9) is None


@pytest.mark.parametrize("collect", [1, 20, 1 << 21])
@pytest.mark.parametrize("uids", [300, 4, 1])
def test_many_equal_values_are_cut_by_uid_then_place(tmp_path, monkeypatch, collect, uids):
    monkeypatch.setattr(cuts, "COLLECT", collect)
    monkeypatch.setattr(plan, "COLLECT", collect)
    shards = [[row((100 * shard + place) % uids, 1.0) for place in range(100)] for shard in range(3)]
    run = write_run(tmp_path, shards)
    select(run, SelectConfig(keep=137), seed=0)
    assert kept(run) == sorted(ranking(shards)[:137])


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("uid_of", [lambda n: "0" * 16 + uid(n)[16:], "{:032x}".format, "{:028x}ffff".format])
def test_digits_of_any_width_find_the_same_cut_in_every_group(tmp_path, monkeypatch, bits, uid_of):
    monkeypatch.setattr(cuts, "COLLECT", 1)
    monkeypatch.setattr(cuts, "digit_bits", lambda strata: bits)
    monkeypatch.setattr(ScoreFile.spans, "__defaults__", (7,))
    # two captions with ties each; uids that share their first half, or all but a few digits
    rows = [row(n, float(n % 3), caption_id=n % 2, uid=uid_of(n)) for n in range(60)]
    run = write_run(tmp_path, [rows[:40], rows[40:]])
    select(run, SelectConfig(keep=0.4, balance=BalanceConfig(by="caption")), seed=0)
    order = ranking([rows[:40], rows[40:]])
    for group in (0, 1):
        mine = [place for place in order if (40 * place[0] + place[1]) % 2 == group]
        assert sorted(mine[:12]) == [place for place in kept(run) if (40 * place[0] + place[1]) % 2 == group]


@pytest.mark.parametrize("keep", [1.0, 1])
def test_one_pair_is_kept(tmp_path, keep):
    run = write_run(tmp_path, [[], [row(1, 0.5)], []])
    select(run, SelectConfig(keep=keep), seed=0)
    assert kept(run) == [(1, 0)]
    assert len(storage.list_files(run.selection() + "/keep", ".parquet")) == 3


def test_a_count_that_cannot_be_met_is_refused(tmp_path):
    run = write_run(tmp_path, [[row(1, 0.5), row(2, math.nan)]])
    with pytest.raises(ConfigError, match=r"select\.keep: expected at most the 1 pairs that can be kept, found 2"):
        select(run, SelectConfig(keep=2), seed=0)


def test_a_threshold_that_no_pair_reaches_is_refused(tmp_path):
    run = write_run(tmp_path, [[row(1, 0.5), row(2, 1.5)]])
    with pytest.raises(ConfigError, match=r"select\.keep\.threshold: expected a threshold that some pair reaches"):
        select(run, SelectConfig(keep=Threshold(threshold=9)), seed=0)
    assert not storage.exists(summary_file(run, "default"))


def test_no_scores_is_one_line(tmp_path):
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


def test_threads_are_started_where_the_system_does_not_say_how_many_cpus_a_process_has(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert list(thread_map(abs, [-1, 2])) == [1, 2]


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


def test_a_selection_on_an_object_store_is_the_same(tmp_path):
    shards = [[row(100 * shard + place, float(place % 7)) for place in range(30)] for shard in range(2)]
    run = write_run(tmp_path, shards)
    config = SelectConfig(keep=0.4, dedup=DedupConfig(exact=True), by="rank(utility)")
    select(run, config, seed=0)
    remote = RunFolder("memory://selected")
    for url in storage.list_files(run.scores):
        storage.write_bytes(url.replace(run.root, remote.root), storage.read_bytes(url))
    try:
        select(remote, config, seed=0)
        for shard in range(2):
            name = f"/keep/{shard:05d}.parquet"
            assert storage.read_bytes(remote.selection() + name) == storage.read_bytes(run.selection() + name)
        assert not storage.exists(storage.join(remote.root, "scratch"))
    finally:
        fsspec.filesystem("memory").rm("/selected", recursive=True)


def test_many_sources_are_counted_with_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_SOURCES", 3)
    rows = [row(n, float(n), source=f"{'abcdefgh'[n % 8]}.org" if n < 40 else "a.org") for n in range(80)]
    run = write_run(tmp_path, [rows[:40], rows[40:]])
    summary = select(run, SelectConfig(keep=20), seed=0)
    assert [(source.name, source.pairs) for source in summary.sources][:2] == [("a.org", 45), (write.OTHER_SOURCES, 30)]
    assert sum(source.pairs for source in summary.sources) == 80
    assert sum(source.kept for source in summary.sources) == 20


def test_a_failed_selection_leaves_no_scratch_and_the_one_before_it(tmp_path):
    run = write_run(tmp_path, [[row(n, float(n)) for n in range(9)], [row(9, 9.0, uid="no uid")]])
    select(run, SelectConfig(keep=3), seed=0)
    with pytest.raises(InputError, match=r"00001\.parquet: expected uids of 32 hex digits"):
        select(run, SelectConfig(keep=3, by="utility * 0"), seed=0)
    assert not (tmp_path / "scratch").exists()
    assert read_summary(run, "default").config["by"] == "utility"


def test_progress_names_the_passes_and_the_summary_has_their_seconds(tmp_path, monkeypatch):
    ticks = count(0.0, 0.25)
    monkeypatch.setattr(select_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run = write_run(tmp_path, [[row(n, float(n)) for n in range(9)]])
    told: list[str] = []
    summary = select(run, SelectConfig(keep=3, by="rank(utility)"), seed=0, progress=told.append)
    assert told == ["ranking", "counting", "finding the cut", "writing keep lists"]
    assert summary.seconds == dict.fromkeys(told, 0.25)
    assert summary.threshold == pytest.approx(6.5 / 9)
