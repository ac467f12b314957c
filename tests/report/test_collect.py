"""The two streaming passes against the same numbers computed in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from pipeline.report.collect import TAIL, Findings, Sample, _edges, collect
from pipeline.report.figures import agreement_figures, correlation_label, spearman, utility_figure, variance_shares
from pipeline.report.groups import GroupCounter, wilson
from pipeline.report.rows import ShardRows, selections
from pipeline.store.scores import score_schema
from tests.report.synthetic import Made, make_run, select
from tests.selection.scores import row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("collect"), size=16)


@pytest.fixture(scope="module")
def found(made: Made) -> Findings:
    return collect(made.run, made.inventory, ["default", "similar"], gallery=8, seed=0)


def test_histogram_and_densities_count_every_scored_pair(made: Made, found: Findings) -> None:
    assert found.histogram is not None
    assert int(found.histogram.kept.sum()) == found.kept
    assert int(found.histogram.pruned.sum()) == found.pruned
    for density in found.densities.values():
        assert int(density.counts.sum()) == found.scored == 494
    assert found.total == 500


def test_no_bin_holds_both_sides_of_a_sharp_threshold(made: Made, found: Findings) -> None:
    utility = made.column("utility")
    assert found.cut.sharp
    assert found.cut.centre == np.nanmin(utility[utility >= np.nanquantile(utility, 0.4)])
    assert found.histogram is not None
    assert not ((found.histogram.kept > 0) & (found.histogram.pruned > 0)).any()
    assert "is kept" in utility_figure(found.histogram, found.cut).see


def test_ranks_and_galleries_match_a_sort(made: Made, found: Findings) -> None:
    utility = made.column("utility")
    best = np.argsort(-utility)[:8]
    uids = made.column("uid")
    assert [pair.uid for pair in found.galleries["highest"]] == [str(uids[row]) for row in best]
    assert [found.ranks[pair.shard, pair.index] for pair in found.galleries["highest"]] == list(range(1, 9))
    assert [found.ranks[pair.shard, pair.index] for pair in found.galleries["lowest"]] == list(range(494, 486, -1))
    around = [pair.utility for pair in found.galleries["threshold"]]
    finite = np.sort(utility[np.isfinite(utility)])
    cut = int(np.searchsorted(finite, found.cut.centre))
    assert sorted(around) == finite[cut - 4 : cut + 4].tolist()


def test_galleries_may_show_one_pair_each(made: Made) -> None:
    found = collect(made.run, made.inventory, ["default"], gallery=1, seed=0)
    assert {name: len(found.galleries[name]) for name in ("highest", "lowest", "threshold")} == {
        "highest": 1, "lowest": 1, "threshold": 1
    }  # fmt: skip
    assert found.galleries["threshold"][0].utility >= found.cut.centre


def test_sample_is_the_same_for_any_order_of_shards(made: Made) -> None:
    forward = collect(made.run, made.inventory, ["default"], gallery=2, seed=3, sample=60).sample
    backward = collect(made.run, made.inventory[::-1], ["default"], gallery=2, seed=3, sample=60).sample
    other = collect(made.run, made.inventory, ["default"], gallery=2, seed=4, sample=60).sample
    assert len(forward) == 60
    np.testing.assert_array_equal(np.sort(forward["utility"]), np.sort(backward["utility"]))
    assert set(forward["utility"]) != set(other["utility"])


def rows_of(shard: int, status: list[str]) -> ShardRows:
    """Rows with two terms where the status is ok."""
    scored = (float(shard) if each == "ok" else None for each in status)
    return shard_rows(
        shard,
        [
            row(number, utility, status=each, terms=None if utility is None else [1.0, 2.0])
            for number, (each, utility) in enumerate(zip(status, scored, strict=True))
        ],
    )


def shard_rows(shard: int, rows: list[dict[str, Any]]) -> ShardRows:
    """All of these rows are kept."""
    whole = [{**each, "shard": f"{shard}.tar", "index": index} for index, each in enumerate(rows)]
    return ShardRows(shard, pa.Table.from_pylist(whole, schema=score_schema()), [np.arange(len(rows))])


@pytest.mark.parametrize("bad", [["corrupt-image"] * 5, []])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_a_shard_without_a_scored_pair_takes_no_terms_from_the_others(bad: list[str], order: tuple[int, ...]) -> None:
    shards = [rows_of(0, ["ok", "no-caption", "ok"]), rows_of(1, bad), rows_of(2, ["ok"])]
    sample = Sample(10, seed=0)
    for shard in order:
        sample.add(shards[shard])
    sample.finish()
    assert sample.terms.tolist() == [[1, 2]] * 3
    assert sorted(sample["utility"]) == [0, 0, 2]


def test_a_sample_of_no_pair_is_empty() -> None:
    sample = Sample(10, seed=0)
    sample.add(rows_of(0, ["corrupt-image"]))
    sample.finish()
    assert (len(sample), sample.terms.shape, sample["utility"].tolist(), sample.kept.tolist()) == (0, (0, 0), [], [])


def test_groups_match_plain_counts(made: Made, found: Findings) -> None:
    utility, sources = made.column("utility"), made.column("source")
    scored = np.isfinite(utility)
    kept = scored & (utility >= found.cut.centre)
    for group in found.sources.largest():
        mine = sources == group.name
        assert (group.pairs, group.kept) == (int((mine & scored).sum()), int((mine & kept).sum()))
        assert sources[group.example[0] * 100 + group.example[1]] == group.name
    assert found.significant["known"] == 494


def test_comparison_counts_each_pair_once(made: Made, found: Findings) -> None:
    utility, similarity = made.column("utility"), made.column("similarity")
    this, that = utility >= found.cut.centre, similarity >= 0.2
    cells = found.comparisons[0].cells
    assert cells["both"][0] == (this & that).sum()
    assert cells["only that"][0] == (~this & that).sum()
    assert sum(cell[0] for cell in cells.values()) == 494
    assert found.comparisons[0].jaccard == pytest.approx((this & that).sum() / (this | that).sum())
    assert cells["both"][2] == pytest.approx(utility[this & that].sum(dtype=np.float64), rel=1e-6)
    assert selections(made.run) == ["default", "similar"]


def test_an_uncut_run_has_no_threshold(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=30, size=16, extras=False)
    select(made.run, made.tables, "default", -np.inf, "utility")
    found = collect(made.run, made.inventory, ["default"], gallery=4, seed=0)
    assert found.pruned == 0
    assert not found.cut.sharp
    assert found.galleries["threshold"] == []
    assert found.histogram is not None
    assert utility_figure(found.histogram, found.cut).see.startswith("All scored pairs are kept.")


def test_scored_row_without_finite_utility_is_rejected() -> None:
    rows = shard_rows(0, [row(0, 1.0, terms=[]), row(1, float("nan"), terms=[])])
    assert rows.scored.tolist() == [True, False]
    assert rows.reasons[1] == "not-finite"
    assert rows.pair(1).status == "not-finite"
    assert rows.terms().shape == (1, 0)


def test_counter_stays_within_its_capacity_and_keeps_the_frequent() -> None:
    counter = GroupCounter(capacity=100)
    rng = np.random.default_rng(0)
    for shard in range(50):
        values = np.concatenate([np.repeat(7, 30), rng.integers(1000, 1_000_000, 60)])
        counter.add(values, np.ones(90, dtype=bool), shard, np.arange(90))
        assert len(counter) <= 100
    assert counter.largest()[0].name == 7
    assert counter.largest()[0].pairs == 1500
    assert counter.pairs == 4500
    assert sum(group.pairs for group in counter.largest()) + counter.dropped == 4500


def test_wilson_interval() -> None:
    low, high = wilson(60, 100)
    assert (round(low, 4), round(high, 4)) == (0.5020, 0.6906)  # computed by hand from Wilson 1927
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_rank_correlations_are_spearmans() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 3)).round(1)  # with ties
    values[:, 2] += values[:, 0]
    np.testing.assert_allclose(spearman(values), spearmanr(values).statistic, atol=1e-12)
    assert np.isnan(spearman(np.column_stack([np.ones(9), np.arange(9.0)]))[0, 1])


def test_variance_shares_add_up_and_find_the_loud_checkpoint() -> None:
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(5000, 4)) * np.array([1, 1, 3, 1])
    shares = variance_shares(terms)
    assert shares.sum() == pytest.approx(1)
    assert shares[2] == pytest.approx(9 / 12, abs=0.05)
    assert np.isnan(variance_shares(np.ones((5, 2)))).all()
    _, carried = agreement_figures(terms, ["a", "b", "c", "d"])
    assert "Checkpoint 3 (c)" in carried.see


def test_correlations_fit_their_cells() -> None:
    values = [1.0, 0.74, 0.04, -0.04, -0.002, -0.46, -1.0, math.nan]
    assert [correlation_label(value, 75) for value in values] == [
        "1.00", "0.74", "0.04", "\u22120.04", "0.00", "\u22120.46", "\u22121.00", ""
    ]  # fmt: skip
    assert [correlation_label(value, 27) for value in values] == ["1", ".7", "0", "0", "0", "\u2212.5", "\u22121", ""]


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_heavy_tails_do_not_squeeze_the_others_into_one_bin(scale: float) -> None:
    rng = np.random.default_rng(0)
    values = scale * np.concatenate([rng.normal(size=950), 100 * rng.normal(size=50)])
    edges = _edges(values, 24)
    middle = np.histogram(values, edges)[0]
    assert edges[0] < -4 * scale
    assert edges[-1] > 4 * scale
    assert middle.max() < 0.35 * len(values)
    far = 90 * scale
    assert _edges(values, 24, far)[-1] == pytest.approx(far)


def test_without_heavy_tails_nearly_all_values_are_within_the_axis() -> None:
    values = np.random.default_rng(1).normal(size=20_000)
    edges = _edges(values, 24)
    assert ((values < edges[0]) | (values > edges[-1])).mean() == pytest.approx(2 * TAIL, abs=0.0005)
    constant = _edges(np.ones(10), 24)
    assert constant[0] < 1 < constant[-1]
