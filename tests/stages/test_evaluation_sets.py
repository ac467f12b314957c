"""The sets that models are trained on: of equal size for each share, and without the target held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import parse_config
from pipeline.data.inventory import ShardInfo, write_inventory
from pipeline.data.positions import Positions
from pipeline.stages.evaluation_sets import training_sets
from pipeline.stages.job import Job
from tests.selection.scores import row, select, write_run

SHARDS, EACH = 3, 40
BASELINES = ["full", "random", "clip-score"]


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    """Utility and similarity of all pairs in another order each; every tenth has not scored."""
    rng = np.random.default_rng(0)
    found = {name: rng.permutation(SHARDS * EACH).astype(np.float32) for name in ("utility", "similarity")}
    found["utility"][9::10] = np.nan
    return found


@pytest.fixture
def job(tmp_path: Path, values: dict[str, np.ndarray]) -> Job:
    """A finished selection of half of the pairs, with a target held out."""
    shards = []
    for shard in range(SHARDS):
        rows = []
        for number in range(shard * EACH, (shard + 1) * EACH):
            utility, similarity = float(values["utility"][number]), float(values["similarity"][number])
            good = np.isfinite(utility)
            rows.append(
                row(number, utility, similarity=similarity) if good else row(number, None, status="corrupt-image")
            )
        shards.append(rows)
    run = write_run(tmp_path, shards)
    infos = [ShardInfo(n, f"/in/{n}.tar", f"{n}.tar", EACH, 1, "v") for n in range(SHARDS)]
    write_inventory(run.inventory, infos)
    found = job_of(tmp_path)
    select(run, found.config.select, seed=0)
    return found


def job_of(root: Path, select: dict[str, Any] | None = None, **evaluate: object) -> Job:
    tree = {
        "out": str(root),
        "data": {"shards": "/in/*.tar"},
        "target": {"pairs": 20},
        "select": {"keep": 0.5} | (select or {}),
        "evaluate": {"baselines": BASELINES, "compare": {"low": {"by": "-utility"}}} | evaluate,
    }
    return Job(parse_config(tree))


def sets_of(job: Job) -> dict[str, Positions]:
    return {each.name: each.positions(0) for each in training_sets(job)}


def free_of(job: Job, values: dict[str, np.ndarray]) -> Positions:
    """Positions of the scored pairs that models may be trained on."""
    return np.setdiff1d(np.flatnonzero(np.isfinite(values["utility"])), job.held_out_positions)


def test_sets_of_a_share_are_equally_large_and_the_best_of_what_may_be_trained_on(
    job: Job, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    job = job_of(tmp_path, keeps=[0.3, 0.7])
    free = free_of(job, values)
    assert 40 < len(job.held_out_positions) < 60
    sets = sets_of(job)
    series = ("kept", "clip-score", "low", "random")
    assert list(sets) == [*(f"{name} {share} %" for share in (30, 70) for name in series), "everything"]
    worst_last = {"kept": -values["utility"], "clip-score": -values["similarity"], "low": values["utility"]}
    for share in (30, 70):
        size = round(share / 100 * len(free))
        for name, order in worst_last.items():
            expected = np.sort(free[np.argsort(order[free])[:size]])
            np.testing.assert_array_equal(sets[f"{name} {share} %"], expected)
        random = sets[f"random {share} %"]
        assert len(random) == size
        assert np.isin(random, free).all()
    np.testing.assert_array_equal(sets["everything"], free)
    shares = [each.share for each in training_sets(job)]
    assert shares == [round(share * len(free)) / len(free) for share in (0.3, 0.7) for _ in range(4)] + [None]


def test_baselines_are_as_large_as_what_is_left_of_a_selection(job: Job, values: dict[str, np.ndarray]) -> None:
    free = free_of(job, values)
    sets = sets_of(job)
    (kept,) = (positions for name, positions in sets.items() if name.startswith("kept"))
    best = np.argsort(-np.nan_to_num(values["utility"], nan=-1))[:54]
    np.testing.assert_array_equal(kept, np.intersect1d(best, free))
    assert {len(positions) for name, positions in sets.items() if name != "everything"} == {len(kept)}


def test_a_share_is_of_all_that_may_be_trained_on_whatever_a_condition_rules_out(
    job: Job, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    kept = sets_of(job_of(tmp_path, select={"where": "index < 30"}, keeps=[0.5]))["kept 50 %"]
    free = free_of(job, values)
    meets = free[free % EACH < 30]
    best = meets[np.argsort(-values["utility"][meets])[: round(0.5 * len(free))]]
    np.testing.assert_array_equal(kept, np.sort(best))
