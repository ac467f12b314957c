from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.evaluation.agreement import LEADER, Measured, between_seeds, table
from pipeline.evaluation.by_runs import by_runs
from pipeline.evaluation.cleaning import suspects, with_swapped_captions
from pipeline.evaluation.correlation import bootstrapped, mean_spearman, spearman
from pipeline.evaluation.deletion import _by_unrolling, deletions
from pipeline.evaluation.estimates import RunEstimator, forms_of
from pipeline.evaluation.lds import predicted_outcomes, random_halves
from pipeline.evaluation.leave_one_out import left_out_changes, left_out_pairs
from pipeline.evaluation.small_run import SmallRun
from pipeline.evaluation.steepness import stability_limit, steepness
from pipeline.evaluation.validation_plot import plot
from pipeline.influence import Batches, Settings, prepare_run
from pipeline.influence.trees import plus, scaled
from pipeline.models.checkpoint import decay_of_each
from tests.evaluation.runs import make_run
from tests.influence.oracle import Explicit

ROWS = np.arange(24)

#: With a small epsilon AdamW's first steps are signs of the gradient, which no derivative predicts.
SMOOTH = 1.0
EXACT = {form.name: form for form in forms_of(["unrolled"], Settings())}


def utilities(run: SmallRun, name: str) -> np.ndarray:
    return RunEstimator(run, [1, run.steps], run.data).estimate(EXACT[name]).utilities


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.005), ("adamw", 0.01)])
def test_exact_replay_predicts_leave_one_out_in_its_own_units(optimizer: str, rate: float) -> None:
    run = make_run(optimizer, batch=12, steps=6, rate=rate, eps=SMOOTH)
    predicted = utilities(run, "unrolled (own batches)")
    true = left_out_changes(run, ROWS)
    assert spearman(predicted, true) > 0.98
    assert np.polyfit(predicted, true, 1)[0] == pytest.approx(1, abs=0.1)


def test_with_full_batches_every_step_ranks_as_own_batches() -> None:
    run = make_run(steps=4, rate=0.005)
    assert spearman(utilities(run, "unrolled (every step)"), utilities(run, "unrolled (own batches)")) > 0.999


def test_gathered_directions_are_those_of_the_recorded_checkpoints() -> None:
    run = make_run("adamw", batch=12, steps=4, rate=0.01)
    estimator, form = RunEstimator(run, [2, 4], run.data), EXACT["unrolled (replayed)"]
    batches = Batches(run.data, run.data, run.target)
    checkpoints = [run.states[2], run.states[4]]
    expected = prepare_run(run.model, checkpoints, batches, form.settings, dataset_size=24, replay=run.replay())
    found, _ = estimator._plans(form)
    for one, other in zip(found, expected, strict=True):
        for name, value in other.vectors["v"].items():
            torch.testing.assert_close(one.vectors["v"][name], value, rtol=1e-6, atol=1e-10)


def test_momentum_and_clipping_are_those_of_torch() -> None:
    run = make_run(batch=12, steps=5, rate=0.05, momentum=0.9, grad_clip=0.5)
    run.model.load_state_dict(run.start.params)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    for step in range(5):
        batch = run.batch(step)
        features = run.model(batch.images, batch.tokens)
        logits = features.scale * features.image @ features.text.T
        loss = (logits.logsumexp(1) + logits.logsumexp(0)).mean() / 2 - logits.diagonal().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        optimizer.step()
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(run.states[-1].params[name], value.detach(), rtol=1e-9, atol=1e-12)


def test_what_the_trainer_does_not_decay_does_not_decay() -> None:
    run = make_run(steps=1)
    for name in ("relative_position_bias_table", "idle"):
        run.start.params[name] = torch.ones(2, 2, dtype=torch.float64)
        run.model.register_parameter(name, torch.nn.Parameter(run.start.params[name]))
    decay = decay_of_each(run.start.params, 0.5)
    run.recipe = replace(run.recipe, rule=replace(run.recipe.rule, weight_decay=decay))
    after = run.states[-1].params
    assert (after["relative_position_bias_table"] == 1).all()
    assert (after["idle"] == 1 - 0.05 * 0.5).all()
    assert (decay["relative_position_bias_table"], decay["idle"], decay["logit_scale"]) == (0, 0.5, 0)


def test_lds_of_an_oracle_is_one() -> None:
    halves = random_halves(20, 30, seed=3)
    assert (halves.sum(1) == 10).all()
    assert len(np.unique(halves, axis=0)) == 30
    effects = np.random.default_rng(0).normal(size=20)
    results = predicted_outcomes(effects, halves) * 2 - 7
    assert spearman(predicted_outcomes(effects, halves), results) == pytest.approx(1)
    assert spearman(predicted_outcomes(-effects, halves), results) == pytest.approx(-1)


def test_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        x = rng.normal(size=(1, 60))
        y = 0.6 * x + 0.8 * rng.normal(size=(1, 60))
        found = mean_spearman(x, y, seed=trial)
        covered += found.low <= 6 / np.pi * np.arcsin(0.6 / 2) <= found.high
        assert found.low <= found.value <= found.high
    assert covered >= 34


def test_what_cannot_be_ranked_is_nan() -> None:
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert np.isnan(spearman(np.array([1.0, np.nan]), np.arange(2.0)))
    assert np.isnan(bootstrapped(lambda items: np.ones(items.shape[:-1]), 2).low)


@pytest.mark.parametrize(("optimizer", "momentum", "limit"), [("sgd", 0.0, 2), ("sgd", 0.5, 3), ("adamw", 0.0, 38)])
def test_the_stability_limit_is_that_of_a_quadratic(optimizer: str, momentum: float, limit: float) -> None:
    run = make_run(optimizer, steps=2, momentum=momentum)
    assert stability_limit(run) == pytest.approx(limit)
    for factor, grows in ((0.98, False), (1.02, True)):
        x, m, rate = 1.0, 0.0, factor * limit  # the loss x^2 / 2, whose curvature is 1
        for _ in range(2000):
            m = 0.9 * m + 0.1 * x if optimizer == "adamw" else momentum * m + x
            x -= rate * m
        assert (abs(x) > 1) == grows


def test_steepness_grows_with_the_rate_and_is_that_of_the_hessian() -> None:
    slow, fast = make_run(steps=3, rate=0.01), make_run(steps=3, rate=0.02)
    found = steepness(fast, Settings())
    assert found == pytest.approx(2 * steepness(slow, Settings()), rel=0.2)
    largest = []
    for state in fast.states[:-1]:
        explicit = Explicit(fast.model, state, Settings())
        largest.append(float(torch.linalg.eigvalsh(explicit.batch(fast.data, 2))[-1]))
    assert found == pytest.approx(0.02 * max(largest), rel=1e-3)


def test_left_out_pairs_and_their_changes_are_seeded() -> None:
    rows = left_out_pairs(24, 5, 0)
    assert rows.tolist() == left_out_pairs(24, 5, 0).tolist()
    assert len(set(rows.tolist())) == 5
    run = make_run(steps=4)
    each, together = left_out_changes(run, rows[:1]), left_out_changes(run, rows)
    assert each[0] == pytest.approx(together[0], rel=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_deletion_by_unrolling_comes_near_the_retrained_model(optimizer: str) -> None:
    run = make_run(optimizer, batch=12, steps=5, rate=0.005, eps=SMOOTH)
    sets = np.zeros((3, 24), dtype=bool)
    sets[[0, 0, 1, 1, 2, 2], [1, 2, 7, 8, 20, 3]] = True
    found = {(item.method, row): item for row, item in enumerate(deletions(run, [2, 5], Settings(), sets))}
    best = [item for (method, _), item in found.items() if method == "unrolled (every step)"]
    plain = [item for (method, _), item in found.items() if method == "tracin"]
    assert {method for method, _ in found} == {"fine-tuning", "diff-in", "tracin", "unrolled (every step)"}
    assert len(best) == len(plain) == 2
    for item, other in zip(best, plain, strict=True):
        assert item.distance < 0.35
        assert item.distance < other.distance < 1.1
        assert item.true == other.true


def test_checkpoints_of_a_momentum_run_predict_leave_one_out_in_its_own_units() -> None:
    run = make_run(steps=60, rate=0.0002, momentum=0.9)
    form = next(form for form in forms_of(["unrolled"], Settings()) if form.settings.replay == "checkpoints")
    found = RunEstimator(run, [20, 40, 60], run.data).estimate(form).utilities
    exact = utilities(run, "unrolled (every step)")
    assert spearman(found, exact) > 0.98
    assert np.polyfit(found, exact, 1)[0] == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_deletion_by_unrolling_is_the_derivative_of_retraining(optimizer: str, grad_clip: float | None) -> None:
    run = make_run(optimizer, batch=12, steps=5, rate=0.01, eps=1e-2, momentum=0.5, grad_clip=grad_clip)
    chosen = np.isin(ROWS, [1, 2, 9])
    found = _by_unrolling(run, [5], Settings(), chosen)
    ahead, behind = (run.retrained(torch.from_numpy(chosen)[None], removal=h) for h in (1e-5, -1e-5))
    expected = scaled(plus(ahead, behind, -1.0), 0.5e5)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name][0], rtol=1e-6, atol=1e-8)


def test_swapped_captions_are_known() -> None:
    data = make_run().data
    swapped, wrong = with_swapped_captions(data, 0.25, seed=0)
    assert wrong.sum() == 6
    assert sorted(swapped.captions.tolist()) == sorted(data.captions.tolist())
    changed = (swapped.tokens != data.tokens).any(1).numpy()
    assert not (changed & ~wrong).any()


def test_suspects_are_the_lowest() -> None:
    assert suspects(np.array([3.0, -1.0, 2.0, -5.0]), 2).tolist() == [False, True, False, True]


def test_table_and_plot_of_a_known_case() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(2, 30))
    halves = random_halves(30, 40, 0)
    measured = Measured(
        utilities={LEADER: effects, "random": rng.normal(size=(2, 30))},
        costs={LEADER: (5.0, 3.0), "random": (0.0, 1.0)},
        rows=np.arange(12),
        changes=effects[:, :12],
        halves=halves,
        outcomes=predicted_outcomes(effects, halves),
    )
    best, chance = table(measured)
    assert best.loo.value == pytest.approx(1)
    assert best.lds.value == pytest.approx(1)
    assert best.behind is None
    assert best.lds.low > chance.lds.high
    assert chance.behind is not None
    assert chance.behind.low > 0
    assert best.loo_partial is None
    runs = list(by_runs(measured, effects.mean(0) < 0))
    assert plot([best, chance], runs) == plot([best, chance], runs)
    assert plot([best, chance], [])


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_what_carries_over_is_asked_of_seeds_that_are_not_in_the_average(shared: float) -> None:
    rng = np.random.default_rng(0)
    effects = shared * rng.normal(size=40) + (1 - shared) * rng.normal(size=(4, 40))
    halves = random_halves(40, 200, 0)
    outcomes = predicted_outcomes(effects, halves)
    measured = Measured(
        utilities={LEADER: effects, "half": effects + rng.normal(size=(4, 40))},
        costs={LEADER: (0.0, 1.0), "half": (0.0, 1.0)},
        rows=np.arange(12),
        changes=effects[:, :12],
        halves=halves,
        outcomes=outcomes,
    )
    line, half = table(measured)
    lines = [found for found in by_runs(measured, None) if found.estimator == LEADER]
    assert line.lds.value == pytest.approx(1)
    assert line.lds_other is not None
    assert line.loo_other is not None
    assert half.behind_other is not None
    others = [line.lds_other.value, *(found.lds for found in lines[:3] if found.lds is not None)]
    assert len(others) == 4
    assert others == pytest.approx([shared] * 4, abs=0.25)
    assert line.loo_other.value == pytest.approx(shared, abs=0.6)
    assert half.behind_other.value == pytest.approx(0.3 * shared, abs=0.3)
    assert between_seeds(outcomes) == pytest.approx(shared, abs=0.25)
    assert lines[3].lds is None
    assert [found.lds_std is None for found in lines] == [False, False, False, True]
    alone = table(replace(measured, utilities={LEADER: effects[:1]}, outcomes=outcomes[:1], changes=effects[:1, :12]))
    assert alone[0].lds_other is None
    assert np.isnan(between_seeds(outcomes[:1]))


def test_a_run_says_how_many_were_trained() -> None:
    run = make_run(steps=2)
    trained: list[int] = []
    run.on_trained = trained.append
    left_out_changes(run, np.arange(20))
    assert trained == [16, 5]


def test_averaging_runs_helps_where_their_errors_differ() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(size=40)
    halves = random_halves(40, 60, 0)
    runs = effects + 2 * rng.normal(size=(5, 40))
    runs[1] *= 100  # a run of another scale counts no more than the others
    measured = Measured(
        utilities={"noisy": runs},
        costs={"noisy": (0.0, 1.0)},
        rows=np.arange(3),
        changes=np.zeros((5, 3)),
        halves=halves,
        outcomes=np.repeat(predicted_outcomes(effects, halves)[None], 5, 0),
    )
    lines = list(by_runs(measured, effects < 0))
    assert [line.runs for line in lines] == [1, 2, 3, 4, 5]
    rates = [line.lds for line in lines[:4] if line.lds is not None]
    assert len(rates) == 4
    assert all(before < after for before, after in pairwise(rates))
    assert lines[-1].auroc is not None
    assert lines[0].auroc is not None
    assert lines[-1].auroc > lines[0].auroc + 0.1
    assert lines[-1].auroc_std is None
    assert all(line.auroc is None for line in by_runs(measured, None))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_derivative_predicts_a_partial_removal_best(optimizer: str) -> None:
    run = make_run(optimizer, batch=12, steps=6, rate=0.05, eps=SMOOTH)
    predicted = utilities(run, "unrolled (own batches)")
    off = []
    for removal in (1.0, 0.01):
        found = left_out_changes(run, ROWS, removal) / removal
        off.append(float(np.linalg.norm(found - predicted) / np.linalg.norm(predicted)))
    assert off[1] < 0.01 < off[0]


def test_an_adamw_run_goes_on_with_the_moments_it_starts_from() -> None:
    long = make_run("adamw", batch=12, steps=6, rate=0.01, eps=SMOOTH)
    half = replace(long, recipe=replace(long.recipe, order=long.recipe.order[3:], rates=long.recipe.rates[3:]))
    half.start = replace(long.states[3], step=0)
    for before, after in zip(long.states[3:], half.states, strict=True):
        assert before.adam is not None
        assert after.adam is not None
        assert (after.step, after.adam.steps) == (before.step - 3, before.adam.steps)
        for name, value in before.params.items():
            torch.testing.assert_close(after.params[name], value, rtol=1e-12, atol=1e-14)
    true = left_out_changes(half, ROWS, 0.01) / 0.01
    assert utilities(half, "unrolled (own batches)") == pytest.approx(true, rel=0.05, abs=1e-3 * np.abs(true).max())
