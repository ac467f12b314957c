"""Scores depend on the pair, the checkpoints and R alone; every checkpoint counts with its own weights."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import get_args

import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.influence import UTILITY, ProbePlan, Scorer, Settings, prepare_run, utility_of
from pipeline.influence.scorer import with_reference
from pipeline.literals import EstimatorName
from pipeline.types import PairBatch
from tests.influence.oracle import Explicit
from tests.influence.test_diff_in import N, assert_close, make_case
from tests.influence.towers import SmallTowers, make_pairs

ESTIMATORS = get_args(EstimatorName)


def scorer_of(settings, dtype=torch.float64, **kwargs):
    model, checkpoints, batches, pairs = make_case(settings, dtype)
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=N)
    return Scorer(model, list(zip(checkpoints, plans, strict=True)), batches.reference, settings, **kwargs), pairs


def test_every_estimator_has_a_sign():
    assert set(UTILITY) == set(ESTIMATORS)


def test_a_large_self_influence_is_suspect_whatever_its_sign():
    scores = torch.tensor([-3.0, 0.5, 2.0])
    assert utility_of("diff-in-self", scores).tolist() == [-3.0, -0.5, -2.0]
    assert utility_of("diff-in", scores).tolist() == [3.0, -0.5, -2.0]
    assert utility_of("tracin", scores).tolist() == scores.tolist()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_do_not_depend_on_neighbours(estimator):
    settings = Settings(estimator=estimator, projections=4, eigenpairs=2)
    scorer, pairs = scorer_of(settings)
    together = scorer.score(pairs)
    scorer.batch_size = 2
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    apart = scorer.score(pairs[order])
    for name in ("terms", "loss", "similarity"):
        # Diff-In's differences divide rounding errors by the step, 1e-6 of the scale of the loss.
        assert_close(getattr(apart, name), getattr(together, name)[order], 1e-8)
    assert together.terms.shape == (6, 3)
    assert bool(together.terms.isfinite().all())


class Cramped(nn.Module):
    """Towers whose device holds so many pairs at a time."""

    def __init__(self, towers, room, error=None):
        super().__init__()
        self.towers = towers
        self.room = room
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.tried = []
        self.lost = []
        self.still_held = 0

    def forward(self, images, tokens):
        self.tried.append(len(images))
        self.still_held += sum(ref() is not None for ref in self.lost)
        activations = torch.ones(len(images))
        if len(images) > self.room:
            self.lost.append(weakref.ref(activations))
            raise type(self.error)(*self.error.args)  # a new one: a traceback keeps what frames hold
        return self.towers(images, tokens)


#: How a lack of memory shows, beside torch's own error.
LACKS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
]


def cramped(room, batch_size, error=None):
    settings = Settings(estimator="tracin")
    towers, checkpoints, batches, pairs = make_case(settings)
    model = Cramped(towers, 100, error)
    of_towers = [
        replace(point, params={f"towers.{name}": value for name, value in point.params.items()}, adam=None)
        for point in checkpoints[:1]
    ]
    plans = prepare_run(model, of_towers, batches, settings, dataset_size=N)
    parts = list(zip(of_towers, plans, strict=True))
    expected = Scorer(model, parts, batches.reference, settings).score(pairs)
    model.room, model.tried = room, []
    return lambda: Scorer(model, parts, batches.reference, settings, batch_size=batch_size), pairs, expected, model


def test_passes_that_memory_does_not_hold_are_halved_for_good():
    scorer_in, pairs, expected, model = cramped(room=2, batch_size=5)
    gc.disable()
    try:
        scorer = scorer_in()
        found = scorer.score(pairs)
    finally:
        gc.enable()
    assert model.lost
    assert not model.still_held, "what a pass held that did not fit is still there for the next one"
    assert scorer.batch_size <= 2
    for name in ("terms", "loss", "similarity"):
        assert_close(getattr(found, name), getattr(expected, name), 1e-12)
    assert torch.equal(found.embedding, expected.embedding)
    tried = len(model.tried)
    scorer.score(pairs)
    assert max(model.tried[tried:]) <= 2


def test_a_device_that_does_not_hold_one_pair_is_an_error():
    scorer_in, *_ = cramped(room=0, batch_size=4)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        scorer_in()


@pytest.mark.parametrize("error", LACKS, ids=lambda error: str(error)[:40])
def test_whatever_says_that_memory_lacks_halves_passes(error):
    scorer_in, pairs, expected, _ = cramped(room=2, batch_size=5, error=error)
    scorer = scorer_in()
    assert_close(scorer.score(pairs).terms, expected.terms, 1e-12)
    assert scorer.batch_size == 2


def test_other_errors_halve_nothing():
    scorer_in, *_, model = cramped(room=2, batch_size=5, error=RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        scorer_in()
    assert model.tried[-1] == 5


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("estimator", "self_form"),
    [(name, "projected") for name in ("diff-in", "tracin", "unrolled", "z0", "tracin-self", "el2n")]
    + [("diff-in-self", "exact")],
)
def test_stored_plans_score_the_same(estimator, self_form, family):
    settings = Settings(estimator=estimator, self_form=self_form, projections=4, family=family)
    model, checkpoints, batches, pairs = make_case(settings)
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=N)
    with_r = [
        with_reference(model, checkpoint, plan, batches.reference, settings)
        for checkpoint, plan in zip(checkpoints, plans, strict=True)
    ]
    stored = [(safetensors.torch.save(tensors), rest) for tensors, rest in (plan.to_tensors() for plan in with_r)]
    again = [ProbePlan.from_tensors(safetensors.torch.load(data), rest) for data, rest in stored]
    assert all(plan.reference for plan in again)
    first, second = (
        Scorer(model, list(zip(checkpoints, p, strict=True)), batches.reference, settings).score(pairs).terms
        for p in (plans, again)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("estimator", ["diff-in", "tracin"])
def test_each_checkpoint_counts_with_its_own_weights(estimator):
    settings = Settings(estimator=estimator, method="exact")
    model, checkpoints, batches, pairs = make_case(settings)
    together = prepare_run(model, checkpoints, batches, settings, dataset_size=N)
    scores = Scorer(model, list(zip(checkpoints, together, strict=True)), batches.reference, settings).score(pairs)
    for index, checkpoint in enumerate(checkpoints):
        explicit = Explicit(model, checkpoint, settings)
        if estimator == "diff-in":
            expected = explicit.diff_in(pairs, batches, N, 3)
        else:
            P = explicit.preconditioner()
            G = explicit.pairs(pairs, batches.reference, 1)
            expected = checkpoint.lr * G @ (P * explicit.batch(batches.target, 1))
        assert_close(scores.terms[:, index], expected, 1e-9)
        other = checkpoints[(index + 1) % 3]
        wrong = Scorer(model, [(other, together[index])], batches.reference, settings).score(pairs).terms[:, 0]
        assert (wrong - expected).abs().max() > 1e-3 * expected.abs().max()


def test_terms_of_runs_are_averaged():
    settings = Settings(estimator="tracin")
    model, checkpoints, batches, pairs = make_case(settings)
    alone = prepare_run(model, checkpoints[:1], batches, settings, dataset_size=N)
    halves = prepare_run(model, checkpoints[:1], batches, settings, dataset_size=N, num_runs=2)
    second = replace(checkpoints[0], run=1)
    one = Scorer(model, [(checkpoints[0], alone[0])], batches.reference, settings).score(pairs).terms.sum(1)
    two = Scorer(model, [(checkpoints[0], halves[0]), (second, halves[0])], batches.reference, settings)
    assert torch.allclose(two.score(pairs).terms.sum(1), one)


def test_only_runs_that_did_not_train_on_a_pair_score_it():
    settings = Settings(estimator="tracin")
    model, checkpoints, batches, pairs = make_case(settings)
    runs = [replace(checkpoint, run=number) for number, checkpoint in enumerate(checkpoints)]
    plans = [
        plan
        for run in runs
        for plan in prepare_run(model, [run], batches, settings, dataset_size=N, num_runs=len(runs))
    ]
    given = (model, list(zip(runs, plans, strict=True)), batches.reference, settings)
    ids = pairs.ids
    # The first pair was seen by no run, the second by one, the third by two, the fourth by all; 5 and 6 by run 1.
    trained = {0: ids[[1, 2, 3]], 1: ids[[2, 3, 4, 5]], 2: ids[[3]]}
    scorer = Scorer(*given, batch_size=4, trained={run: rows.sort()[0] for run, rows in trained.items()})
    found, shown = scorer.score(pairs), scorer.observe(pairs)
    every = Scorer(*given).score(pairs)
    seen = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 1, 0]], dtype=torch.bool)
    assert torch.equal(found.counts, ~seen)
    assert torch.equal(found.terms.isnan(), seen)
    left = ~seen.all(1)
    alone = [Scorer(model, [one], batches.reference, settings).score(pairs) for one in given[1]]
    for name, per_run in (
        ("terms", 3 * every.terms),
        ("loss", torch.stack([one.loss for one in alone], 1)),
        ("similarity", torch.stack([one.similarity for one in alone], 1)),
    ):
        # The mean over the runs that count of what each says alone.
        expected = per_run.masked_fill(seen, torch.nan).nanmean(1)
        values = getattr(found, name)
        assert_close((values.nansum(1) if name == "terms" else values)[left], expected[left], 1e-9)
    assert torch.equal(found.embedding, every.embedding)
    # One forward pass shows the same of each pair, and of each run that counts its embedding.
    assert torch.equal(shown.counts, found.counts)
    assert_close(shown.loss[left].double(), found.loss[left].double(), 1e-6)
    assert_close(shown.similarity[left].double(), found.similarity[left].double(), 1e-6)
    assert shown.loss[~left].isnan().all()
    for run in (0, 1, 2):
        rows = shown.counts[:, run]
        assert torch.equal(shown.embedding[rows, run], alone[run].embedding[rows])
    assert torch.equal(shown.embedding[:, -1], found.embedding)
    # A block that no run may score has no score, but its embedding.
    none = scorer.score(pairs[3:4])
    assert none.terms.isnan().all()
    assert none.loss.isnan().all()
    assert torch.allclose(none.embedding.float(), every.embedding[3:4].float(), atol=1e-3)


def test_loss_and_similarity_are_those_of_the_last_checkpoint():
    settings = Settings()
    model, checkpoints, batches, pairs = make_case(settings)
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=N)
    found = Scorer(model, list(zip(checkpoints, plans, strict=True)), batches.reference, settings).score(pairs)
    explicit = Explicit(model, checkpoints[-1], settings)
    assert_close(found.loss, explicit.pairs(pairs, batches.reference, 0), 1e-12)
    features = torch.func.functional_call(model, checkpoints[-1].params, (pairs.images, pairs.tokens))
    assert_close(found.similarity, (features.image * features.text).sum(1), 1e-12)
    assert torch.equal(found.embedding, torch.cat([features.image, features.text], 1).half())


def test_float32_is_within_a_thousandth():
    for method in ("exact", "central"):
        settings = Settings(method=method)
        exact, pairs = scorer_of(replace(settings, method="exact"))
        single, _ = scorer_of(settings, torch.float32)
        assert_close(single.score(pairs).terms.double(), exact.score(pairs).terms, 1e-3)


class Unsupported(torch.autograd.Function):
    """An operator with a backward but no forward derivative."""

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Doubling(nn.Module):
    def forward(self, x):
        return Unsupported.apply(x)


def test_an_operator_without_forward_derivative_is_named_and_the_forward_form_runs():
    model = SmallTowers()
    settings = Settings()
    _, checkpoints, batches, pairs = make_case(settings)
    model.visual.insert(2, Doubling())
    renamed = [
        replace(
            c,
            adam=None,
            params={n.replace("visual.2", "visual.3"): v for n, v in c.params.items()},
        )
        for c in checkpoints
    ]
    plans = prepare_run(model, renamed, batches, replace(settings, method="forward"), dataset_size=N)
    scorer = Scorer(model, list(zip(renamed, plans, strict=True)), batches.reference, settings)
    assert bool(scorer.score(pairs).terms.isfinite().all())
    central = prepare_run(model, renamed, batches, replace(settings, method="central"), dataset_size=N)
    with pytest.raises(InputError, match=r"visual\.2 \(Doubling\).*method: forward"):
        Scorer(model, list(zip(renamed, central, strict=True)), batches.reference, settings)


class Gate(nn.Module):
    """A gated unit, of which torch has first but no second forward derivatives."""

    def forward(self, x):
        return nn.functional.glu(torch.cat([x, x], 1), 1)


@pytest.mark.parametrize("parameters", ["all", "projections"])
def test_where_second_derivatives_alone_are_missing_the_central_form_runs(parameters):
    model, settings = SmallTowers(), Settings()
    model.visual[1] = Gate()
    _, checkpoints, batches, pairs = make_case(settings)
    plans = {
        method: prepare_run(model, checkpoints, batches, replace(settings, method=method), dataset_size=N)
        for method in ("central", "exact")
    }
    way = replace(settings, parameters=parameters)  # the same plans: only the passes differ
    scorer = Scorer(model, list(zip(checkpoints, plans["central"], strict=True)), batches.reference, way)
    assert bool(scorer.score(pairs).terms.isfinite().all())
    with pytest.raises(InputError, match=r"no second forward derivative in module visual\.1 \(Gate\).*method: central"):
        Scorer(model, list(zip(checkpoints, plans["exact"], strict=True)), batches.reference, way)


def test_z0_needs_two_checkpoints_and_equals_the_product_of_guessed_gradients():
    settings = Settings(estimator="z0")
    model, checkpoints, batches, pairs = make_case(settings)
    with pytest.raises(InputError, match="at least two"):
        prepare_run(model, checkpoints[:1], batches, settings, dataset_size=N)
    checkpoints = [
        replace(checkpoints[0], step=step, params={n: v + step * torch.sin(step * v) / 50 for n, v in p.items()})
        for step, p in enumerate([checkpoints[0].params] * 4, start=1)
    ]
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=N)
    found = Scorer(model, list(zip(checkpoints, plans, strict=True)), batches.reference, settings).score(pairs)
    views = [Explicit(model, c, settings) for c in checkpoints]
    of_pairs = [view.pairs(pairs, batches.reference, 0) for view in views]
    of_target = [view.batch(batches.target, 0)[None] for view in views]

    def guessed(losses, here):
        total = 0
        for there in range(4):
            if there != here and abs(there - here) <= 2:
                way = views[there].theta - views[here].theta
                total = total + torch.outer(losses[there] - losses[here], way) / way.square().sum() / 4
        return total

    expected = sum((guessed(of_pairs, t) @ guessed(of_target, t).T)[:, 0] for t in range(4)) / 4
    assert_close(found.terms.sum(1), expected, 1e-9)


def test_reference_of_equal_ids_counts_once():
    settings = Settings(estimator="clip-score")
    model, checkpoints, batches, _ = make_case(settings)
    plans = prepare_run(model, checkpoints[-1:], batches, settings, dataset_size=N)
    pair = make_pairs(30, seed=9)[3:4]
    pair = PairBatch(pair.images, pair.tokens, pair.ids + 7000, pair.captions)
    with_it = PairBatch.cat([batches.reference, pair])
    losses = [
        Scorer(model, [(checkpoints[-1], plans[0])], r, settings).score(pair).loss for r in (batches.reference, with_it)
    ]
    assert torch.allclose(losses[0], losses[1])
