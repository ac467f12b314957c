"""Comparing two selections of a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from pipeline.config import SelectConfig
from pipeline.errors import StageError
from pipeline.selection import scan
from pipeline.selection.compare import compare
from pipeline.store import storage
from pipeline.store.commits import read_marks
from tests.selection.scores import kept, row, select, write_run


def test_overlap_ranks_and_where_they_differ(tmp_path):
    rng = np.random.default_rng(0)
    utility, similarity = rng.normal(size=(2, 60))
    rows = [row(n, float(utility[n]), similarity=float(similarity[n]), source="ab"[n % 2]) for n in range(60)]
    rows[7] = row(7, None, status="corrupt-image", similarity=None, source=None)
    run = write_run(tmp_path, [rows[:20], rows[20:], []])
    select(run, SelectConfig(keep=0.5, name="a"), seed=0)
    select(run, SelectConfig(keep=25, by="rank(similarity) + 0.001", name="b"), seed=0)
    found = compare(run, "a", "b")

    a, b = (set(kept(run, name)) for name in "ab")
    overall = found.overall
    assert (overall.both, overall.only_a, overall.only_b) == (len(a & b), len(a - b), len(b - a))
    assert overall.jaccard == len(a & b) / len(a | b)
    for overlap, shard in zip(sorted(found.shards, key=lambda o: o.name), (0, 1, 2), strict=True):
        mine = [{place for place in side if place[0] == shard} for side in (a, b)]
        assert (overlap.both, overlap.only_a) == (len(mine[0] & mine[1]), len(mine[0] - mine[1]))
    assert sum(overlap.both for overlap in found.sources) == overall.both
    assert {overlap.name for overlap in found.sources} >= {"a", "b"}
    good = np.delete(np.arange(60), 7)
    assert found.spearman == pytest.approx(spearmanr(utility[good], similarity[good]).statistic, abs=1e-6)
    numbers = [20 * shard + index for shard, index in a & b]
    assert found.mean_utility[0] == pytest.approx(utility[numbers].mean(), abs=1e-6)


def test_the_marks_of_each_run_are_read_once(tmp_path, monkeypatch):
    rows = [row(n, float(n)) for n in range(9)]
    run, other = (write_run(tmp_path / name, [rows]) for name in "ab")
    asked = []
    monkeypatch.setattr(scan, "read_marks", lambda folder: asked.append(folder.root) or read_marks(folder))
    config = SelectConfig(keep=0.5, join={"b": other.root})
    done = select(run, config, seed=0)
    assert done.scores == scan.input_fingerprint(run, config.join)
    assert asked.count(run.root) == 2, "once for the selection, once for the line above"
    asked.clear()
    compare(run, "default", "default")
    assert asked.count(run.root) == 1


def test_a_selection_with_itself(tmp_path):
    run = write_run(tmp_path, [[row(n, float(n)) for n in range(9)]])
    select(run, SelectConfig(keep=0.5), seed=0)
    found = compare(run, "default", "default")
    assert found.overall.jaccard == 1
    assert found.spearman == pytest.approx(1)
    assert math.isnan(found.mean_utility[1])


def test_missing_and_stale_selections_are_refused(tmp_path):
    run = write_run(tmp_path, [[row(n, float(n)) for n in range(9)]])
    with pytest.raises(StageError, match="diffprune select"):
        compare(run, "default", "default")
    select(run, SelectConfig(keep=0.5), seed=0)
    mark = storage.read_json(run.score_mark(0))
    storage.write_json(run.score_mark(0), {**mark, "checksum": "other"})
    with pytest.raises(StageError, match="made from other scores"):
        compare(run, "default", "default")
