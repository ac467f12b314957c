"""Self-influences and gradient norms: the exact forms equal the formulas, the projected ones approach them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from pipeline.errors import InputError
from pipeline.influence import ProbePlan, Scorer, Settings, prepare
from pipeline.influence.hashing import signed
from pipeline.influence.lanczos import krylov, leading_eigenpairs
from tests.influence.oracle import Explicit
from tests.influence.test_diff_in import N, assert_close, make_case, score


def expected_terms(estimator, explicit, pairs, batches):
    checkpoint, P = explicit.checkpoint, explicit.preconditioner()
    G = explicit.pairs(pairs, batches.reference, 1)
    if estimator == "grand":
        return G.norm(dim=1)
    if estimator == "tracin-self":
        return checkpoint.lr * (G * P * G).sum(1)
    H = explicit.pairs(pairs, batches.reference, 2)
    G_B, H_B = explicit.batch(batches.gradient, 1), explicit.batch(batches.gradient, 2)
    factor = -checkpoint.step * checkpoint.lr**2 / N
    brackets = [P * g @ (H_B @ (P * g)) + P * g @ (h @ (P * G_B)) for g, h in zip(G, H, strict=True)]
    return factor * torch.stack(brackets)


@pytest.mark.parametrize("precondition", ["none", "adam"])
@pytest.mark.parametrize("estimator", ["grand", "tracin-self", "diff-in-self"])
def test_exact_forms_equal_the_formulas(estimator, precondition):
    settings = Settings(estimator=estimator, self_form="exact", precondition=precondition)
    model, checkpoints, batches, pairs = make_case(settings)
    terms = score(model, checkpoints[1:2], batches, pairs, settings).terms[:, 0]
    expected = expected_terms(estimator, Explicit(model, checkpoints[1], settings), pairs, batches)
    assert_close(terms, expected, 1e-9)


@pytest.mark.parametrize("estimator", ["grand", "tracin-self", "diff-in-self"])
def test_projected_forms_approach_the_exact_ones(estimator):
    exact = Settings(estimator=estimator, self_form="exact")
    model, checkpoints, batches, pairs = make_case(exact)
    pairs = batches.gradient
    truth = score(model, checkpoints[-1:], batches, pairs, exact).terms[:, 0]
    errors = []
    for count in (4, 64):
        rough = replace(exact, self_form="projected", projections=count, eigenpairs=20)
        found = score(model, checkpoints[-1:], batches, pairs, rough).terms[:, 0]
        errors.append(float((found - truth).norm() / truth.norm()))
    assert errors[1] < 0.5
    assert errors[1] < errors[0]
    assert spearmanr(found, truth)[0] > 0.8


@pytest.mark.parametrize(("estimator", "count"), [("grand", 70), ("tracin-self", 6), ("diff-in-self", 6)])
def test_random_vectors_are_drawn_where_they_are_needed(estimator, count, monkeypatch):
    """A plan keeps one vector for all of them, and as many as fit into memory at a time give the same scores."""
    settings = Settings(estimator=estimator, projections=count, eigenpairs=2)
    model, checkpoints, batches, pairs = make_case(settings)
    plan = prepare(model, checkpoints[0], batches, settings, dataset_size=N, num_checkpoints=1)
    assert len(plan.drawn) == count
    assert set(plan.vectors) == {"root"} | ({"push", "u0", "u1"} if estimator == "diff-in-self" else set())
    plan = ProbePlan.from_tensors(*plan.to_tensors())
    together = Scorer(model, [(checkpoints[0], plan)], batches.reference, settings).score(pairs).terms
    monkeypatch.setattr("pipeline.influence.scorer._DRAWN_BYTES", 1)
    one_by_one = Scorer(model, [(checkpoints[0], plan)], batches.reference, settings).score(pairs).terms
    assert_close(one_by_one, together, 1e-9)


def test_plans_of_earlier_versions_hold_all_their_vectors():
    settings = Settings(estimator="tracin-self", projections=3)
    model, checkpoints, batches, pairs = make_case(settings)
    plan = prepare(model, checkpoints[0], batches, settings, dataset_size=N, num_checkpoints=1)
    stored = {name: signed(plan.vectors["root"], drawn.seed, drawn.index) for name, drawn in plan.drawn.items()}
    tensors, rest = ProbePlan(plan.probes, stored).to_tensors()
    earlier = {name: value for name, value in json.loads(rest).items() if name != "drawn"}
    loaded = ProbePlan.from_tensors(tensors, json.dumps(earlier))
    terms = [
        Scorer(model, [(checkpoints[0], each)], batches.reference, settings).score(pairs).terms
        for each in (plan, loaded)
    ]
    assert_close(terms[1], terms[0], 1e-12)


def test_exact_form_refuses_a_matrix_that_is_too_large(monkeypatch):
    monkeypatch.setattr("pipeline.influence.self_influence._DENSE_LIMIT", 10)
    settings = Settings(estimator="diff-in-self", self_form="exact")
    model, checkpoints, batches, _ = make_case(settings)
    with pytest.raises(InputError, match=r"score\.self_form"):
        prepare(model, checkpoints[0], batches, settings, dataset_size=N, num_checkpoints=3)


def test_krylov_functions_and_eigenpairs():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix = root + root.T
    start = torch.randn(12, generator=generator, dtype=torch.float64)
    cube = krylov(lambda v: matrix @ v, start, 4).apply(lambda values: values**3)
    assert_close(cube, matrix @ (matrix @ (matrix @ start)), 1e-10)
    values, rows = leading_eigenpairs(lambda v: matrix @ v, start, 5)
    expected = torch.linalg.eigvalsh(matrix)
    assert_close(values, expected[expected.abs().argsort(descending=True)[:5]], 1e-9)
    assert_close(rows @ matrix, values[:, None] * rows, 1e-8)


def test_krylov_stops_where_the_space_ends():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    space = krylov(lambda v: matrix @ v, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), 4)
    assert len(space.values) == 2
    assert_close(space.values, torch.tensor([1.0, 2.0], dtype=torch.float64), 1e-12)


def test_functions_of_an_operator_on_nothing_are_nothing():
    space = krylov(lambda v: 2 * v, torch.zeros(4), 3)
    assert space.values.tolist() == [0.0]
    assert space.apply(lambda values: values + 1).tolist() == [0.0] * 4


def test_single_precision_scorer_keeps_its_dtype():
    settings = Settings(estimator="tracin-self", projections=4)
    model, checkpoints, batches, pairs = make_case(settings, torch.float32)
    plan = prepare(model, checkpoints[0], batches, settings, dataset_size=N, num_checkpoints=1)
    terms = Scorer(model, [(checkpoints[0], plan)], batches.reference, settings).score(pairs).terms
    assert terms.dtype == torch.float32
