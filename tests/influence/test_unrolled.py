"""`unrolled` equals the derivative of the final target loss with respect to a pair's weight, taken by autograd."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch.func import functional_call

from pipeline.errors import InputError, StageError
from pipeline.influence import Batches, Replay, Scorer, Settings, StepRule, prepare_run
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.losses import Neighbours, pair_losses
from pipeline.influence.optimizer import RunState, advanced
from pipeline.influence.passes import Passes
from pipeline.influence.unrolled import nearest_checkpoint, stretch
from pipeline.types import AdamState, Checkpoint, PairBatch
from tests.influence.oracle import Explicit
from tests.influence.test_diff_in import assert_close
from tests.influence.towers import SmallTowers, make_pairs, mean_loss, state_of, target_loss

STEPS = 7
POOL = make_pairs(24, seed=1)
TARGET = make_pairs(9, seed=2, first_id=500)
REFERENCE = POOL[:6]
PAIRS = PairBatch.cat([POOL[2:4], POOL[18:20]])
RATES = [0.02, 0.03, 0.03, 0.025, 0.02, 0.01, 0.005]

RULES = {
    "sgd": StepRule("sgd", {}),
    "momentum": StepRule("sgd", {"visual.0.weight": 0.3}, momentum=0.8),
    "adamw": StepRule("adamw", {"visual.0.weight": 0.3}, eps=1e-2),
    "clipped": StepRule("adamw", {}, eps=1e-2, grad_clip=0.2),
}


def batch_of(step):
    rows = torch.randperm(len(POOL), generator=torch.Generator().manual_seed(step))[:10]
    return POOL[rows]


def literal_run(model, rule, extra=None):
    """States after each step by `torch`'s own differentiable operations; `extra(step, params)` joins each loss."""
    params = {name: value.requires_grad_() for name, value in state_of(model).items()}
    first = {name: torch.zeros_like(value) for name, value in params.items()}
    second = dict(first)
    states = [(params, first, second)]
    for step in range(STEPS):
        loss = mean_loss(model, params, batch_of(step), Settings())
        if extra is not None:
            loss = loss + extra(step, params)
        found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        length = torch.sqrt(sum(g.square().sum() for g in found))
        if rule.grad_clip is not None and length > rule.grad_clip:
            found = [g * rule.grad_clip / (length + 1e-6) for g in found]
        grads = dict(zip(params, found, strict=True))
        kept = {n: p * (1 - RATES[step] * rule.weight_decay.get(n, 0.0)) for n, p in params.items()}
        if rule.optimizer == "sgd":
            first = {n: rule.momentum * first[n] + grads[n] for n in params}
            params = {n: kept[n] - RATES[step] * first[n] for n in params}
        else:
            first = {n: rule.beta1 * first[n] + (1 - rule.beta1) * grads[n] for n in params}
            second = {n: rule.beta2 * second[n] + (1 - rule.beta2) * grads[n] ** 2 for n in params}
            m = {n: first[n] / (1 - rule.beta1 ** (step + 1)) for n in params}
            v = {n: second[n] / (1 - rule.beta2 ** (step + 1)) for n in params}
            params = {n: kept[n] - RATES[step] * m[n] / (torch.sqrt(v[n] + 1e-300) + rule.eps) for n in params}
        states.append((params, first, second))
    return states


def checkpoint_of(states, step, rule):
    params, first, second = ({n: v.detach() for n, v in tree.items()} for tree in states[step])
    rate = RATES[step - 1] if step else 0.0
    adam = AdamState(step, first, second, rule.beta1, rule.beta2, rule.eps) if rule.optimizer == "adamw" else None
    return Checkpoint(step, rate, 0, params, {}, adam, first if rule.momentum else None, 1 / (1 - rule.momentum))


def terms_of(model, checkpoints, settings, replay=None, gradient=POOL[6:18]):
    batches = Batches(REFERENCE, gradient, TARGET)
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=len(POOL), replay=replay)
    scorer = Scorer(model, list(zip(checkpoints, plans, strict=True)), REFERENCE, settings)
    return scorer.score(PAIRS).terms, plans


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("recorded", "target"),
    [((1, 2, 3, 4, 5, 6, 7), "contrastive"), ((3, 7), "contrastive"), ((3, 7), "margin")],
    ids=["every step", "two checkpoints", "margin"],
)
def test_exact_replay_is_the_derivative_through_the_run(rule, recorded, target):
    model = SmallTowers()
    plain = literal_run(model, rule)
    checkpoints = [checkpoint_of(plain, step, rule) for step in recorded]
    initial = checkpoint_of(plain, 0, rule)
    settings = Settings(estimator="unrolled", replay="exact", target_loss=target)
    terms, plans = terms_of(model, checkpoints, settings, Replay(rule, RATES, batch_of, initial))
    assert plans[0].facts["replay_error"] < 1e-12
    near = Neighbours(PAIRS.ids, PAIRS.captions, REFERENCE.ids, REFERENCE.captions, False)
    for pair in range(len(PAIRS)):
        weights = torch.zeros(len(recorded), dtype=torch.float64, requires_grad=True)

        def gradients_of_pair(step, params, pair=pair, weights=weights):
            # The pair's gradient at the nearest recorded checkpoint, as a constant push on the parameters.
            index = min(range(len(recorded)), key=lambda i: (abs(recorded[i] - step), recorded[i]))
            at = {n: v.detach().requires_grad_() for n, v in plain[recorded[index]][0].items()}
            features, reference = (functional_call(model, at, (b.images, b.tokens)) for b in (PAIRS, REFERENCE))
            loss = pair_losses(features, reference, near, "clip", "marginal")[pair]
            push = torch.autograd.grad(loss, list(at.values()), allow_unused=True)
            return weights[index] * sum(
                (g * p).sum() for g, p in zip(push, params.values(), strict=True) if g is not None
            )

        final = literal_run(model, rule, gradients_of_pair)[-1][0]
        (slope,) = torch.autograd.grad(target_loss(model, final, TARGET, settings), weights)
        assert_close(terms[pair], -slope, 1e-6)


def test_replay_of_another_run_is_refused():
    model, rule = SmallTowers(), RULES["sgd"]
    states = literal_run(model, rule)
    other = Replay(rule, RATES, lambda step: batch_of(step + 50), checkpoint_of(states, 0, rule))
    with pytest.raises(StageError, match="misses the checkpoint of step 7"):
        terms_of(model, [checkpoint_of(states, 7, rule)], Settings(estimator="unrolled", replay="exact"), other)


def test_exact_replay_without_a_record_is_refused():
    model, rule = SmallTowers(), RULES["sgd"]
    states = literal_run(model, rule)
    with pytest.raises(InputError, match=r"score\.replay"):
        terms_of(model, [checkpoint_of(states, 7, rule)], Settings(estimator="unrolled", replay="exact"))


@pytest.mark.parametrize(
    ("rule", "precondition"),
    [
        (StepRule("adamw", {}, eps=0.3), "none"),
        (StepRule("adamw", {}, eps=0.3), "adam"),
        (StepRule("sgd", {}, momentum=0.8), "auto"),
    ],
    ids=["adamw as sgd", "adamw", "momentum"],
)
def test_from_checkpoints_equals_the_recursion_written_out(rule, precondition):
    model = SmallTowers()
    states = literal_run(model, rule)
    checkpoints = [checkpoint_of(states, step, rule) for step in (1, 3, 7)]
    for checkpoint in checkpoints:  # no mode may grow e-fold, where the recursion is damped
        checkpoint.lr *= 0.2 * (1 - rule.momentum)
    settings = Settings(estimator="unrolled", precondition=precondition)
    terms, plans = terms_of(model, checkpoints, settings)
    u = Explicit(model, checkpoints[-1], settings).batch(TARGET, 1)
    for index in (2, 1, 0):
        explicit = Explicit(model, checkpoints[index], settings)
        H, P = explicit.batch(POOL[6:18], 2), explicit.preconditioner()
        count = stretch(checkpoints, index, [1, 3, 7])[0]
        near = [step for step in range(7) if nearest_checkpoint([1, 3, 7], step) == index]
        rates = np.interp(np.array(near) + 1, [1, 3, 7], [checkpoint.lr for checkpoint in checkpoints])
        rate = float(rates.mean()) / (1 - rule.momentum)
        direction = torch.zeros_like(u)
        for _ in range(count):
            direction = direction + rate * P * u
            u = u - rate * H @ (P * u)
        expected = explicit.pairs(PAIRS, REFERENCE, 1) @ direction
        assert plans[index].facts["damped_modes"] == 0
        assert_close(terms[:, index], expected, 1e-6)
        largest = torch.linalg.eigvalsh(P.sqrt()[:, None] * H * P.sqrt())[-1]
        assert plans[index].facts["eta_lambda_max"] == pytest.approx(rate * float(largest), rel=1e-6)
    assert [stretch(checkpoints, index, [1, 3, 7])[0] for index in range(3)] == [3, 3, 1]


def test_with_momentum_checkpoints_come_near_the_exact_replay():
    model, rule = SmallTowers(), StepRule("sgd", {}, momentum=0.9)
    initial = Checkpoint(0, 0.0, 0, state_of(model), {})
    state, checkpoints = RunState.of(initial, torch.device("cpu")), []
    loss = BatchLoss(Passes(model, Settings()), POOL, list(initial.params))
    for _ in range(120):
        state = advanced(state, loss.gradient(state.params), 0.001, rule)
        if state.step % 30 == 0:
            checkpoints.append(Checkpoint(state.step, 0.001, 0, state.params, {}, None, state.first, 10.0))
    exact, settled = (
        terms_of(model, checkpoints, Settings(estimator="unrolled", replay=replay), record, POOL)[0].sum(1)
        for replay, record in (
            ("exact", Replay(rule, [0.001] * 120, lambda step: POOL, initial)),
            ("checkpoints", None),
        )
    )
    assert (settled - exact).norm() < 0.25 * exact.norm()


def test_momentum_of_unknown_beta_is_refused():
    model, rule = SmallTowers(), RULES["momentum"]
    checkpoint = checkpoint_of(literal_run(model, rule), 7, rule)
    checkpoint.gain = None
    with pytest.raises(InputError, match=r"checkpoint of step 7: expected the beta of SGD's momentum"):
        terms_of(model, [checkpoint], Settings(estimator="unrolled"))


def test_directions_stay_bounded_past_stability():
    model, rule = SmallTowers(), RULES["sgd"]
    checkpoint = checkpoint_of(literal_run(model, rule), 7, rule)
    checkpoint.step, checkpoint.lr = 400, 50.0
    _, plans = terms_of(model, [checkpoint], Settings(estimator="unrolled"))
    (plan,) = plans
    assert plan.facts["eta_lambda_max"] > 2
    assert plan.facts["damped_modes"] > 0
    assert all(bool(value.isfinite().all()) and value.abs().max() < 1e7 for value in plan.vectors["v"].values())


def test_a_replay_past_stability_is_refused(monkeypatch):
    monkeypatch.setattr("pipeline.influence.unrolled._GROWTH_LIMIT", 1e3)
    model, rule = SmallTowers(), RULES["sgd"]
    states = literal_run(model, rule)
    initial, last = checkpoint_of(states, 0, rule), checkpoint_of(states, 7, rule)
    steep = Replay(rule, [400.0] * 7, batch_of, initial)
    monkeypatch.setattr("pipeline.influence.unrolled._REPLAY_LIMIT", float("inf"))
    with pytest.raises(StageError, match=r"past stability \(eta \* lambda_max > 2\)"):
        terms_of(model, [last], Settings(estimator="unrolled", replay="exact"), steep)


def test_a_replay_holds_two_segments_of_states_at_most(monkeypatch):
    model, rule, steps = SmallTowers(), RULES["sgd"], 36
    alive, most = weakref.WeakSet(), 0

    def watched(state, gradient, rate, rule):
        nonlocal most
        moved = advanced(state, gradient, rate, rule)
        alive.add(moved.params["visual.0.weight"])
        most = max(most, len(alive))
        return moved

    state = RunState.of(checkpoint_of(literal_run(model, rule), 0, rule), torch.device("cpu"))
    initial = Checkpoint(0, 0.0, 0, state.params, {})
    settings = Settings(estimator="unrolled", replay="exact")
    for step in range(steps):
        loss = BatchLoss(Passes(model, settings), batch_of(step), list(state.params))
        state = advanced(state, loss.gradient(state.params), 0.01, rule)
    monkeypatch.setattr("pipeline.influence.unrolled.advanced", watched)
    last = Checkpoint(steps, 0.01, 0, state.params, {})
    terms_of(model, [last], settings, Replay(rule, [0.01] * steps, batch_of, initial))
    assert 6 <= most <= 2 * 6 + 2
