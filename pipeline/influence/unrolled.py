"""`unrolled`: the target's gradient carried back through the run, as directions at the recorded checkpoints.

The score of a pair is `sum over steps s of eta_s <u_{s+1}, G_z>`, the first-order change of the final target loss when
the pair's weight in every step is lowered. `G_z` is taken at the recorded checkpoint nearest to the step, so the
directions of all steps near a checkpoint are summed.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.errors import InputError, StageError
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.lanczos import krylov
from pipeline.influence.local import LocalView
from pipeline.influence.optimizer import Adjoint, RunState, StepRule, advanced, carried_back
from pipeline.influence.parameters import chosen_names
from pipeline.influence.passes import Passes
from pipeline.influence.plan import Probe, ProbePlan
from pipeline.influence.settings import Batches, Settings
from pipeline.influence.trees import (
    flattened,
    norm,
    plus,
    restricted,
    to_device,
    tree_map,
    unflattened,
    without_zeros,
)
from pipeline.types import Checkpoint, PairBatch, Tree

#: Largest subspace in which a Hessian acts between two checkpoints; more products change the direction little.
_KRYLOV_STEPS = 24

#: Adjoints that grow by more than this are a sign of a run past its stability limit: they are full of rounding errors.
_GROWTH_LIMIT = 1e8

#: A replay that misses a recorded checkpoint by more than this share of the way is not of this run.
_REPLAY_LIMIT = 0.05


@dataclass(frozen=True)
class Replay:
    """What an exact replay needs to know of a run.

    Attributes:
        rule: its optimizer.
        rates: learning rate of each step; `rates[s]` leads from step `s` to `s + 1`.
        pairs: the pairs that step saw, by `s`.
        initial: the weights before the first step.
    """

    rule: StepRule
    rates: Sequence[float]
    pairs: Callable[[int], PairBatch]
    initial: Checkpoint


def nearest_checkpoint(steps: Sequence[int], step: int) -> int:
    """Index of the recorded step nearest to a step; the earlier one of two."""
    return min(range(len(steps)), key=lambda index: (abs(steps[index] - step), steps[index]))


def unrolled_exactly(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    batches: Batches,
    settings: Settings,
    replay: Replay,
    num_runs: int,
) -> list[ProbePlan]:
    """Directions by going back through every step of the run, the optimizer's state included.

    Each stretch between two recorded states is run again from its start, with about twice the square root of its steps
    kept, in main memory.
    Raises `StageError` when the replay does not lead to the recorded checkpoints or the adjoint grows without bounds.
    """
    device = next(model.parameters()).device
    passes = Passes(model, replace(settings, precision="fp32"))
    names = list(checkpoints[-1].params)
    buffers = to_device(checkpoints[-1].buffers, device)
    chosen = chosen_names(names, settings.parameters)
    start = BatchLoss(passes, batches.target.to(device), names, settings.target_loss).gradient(
        {**to_device(checkpoints[-1].params, device), **buffers}
    )
    zeros = tree_map(torch.zeros_like, start)
    adjoint = Adjoint(start, zeros, zeros)
    limit = _GROWTH_LIMIT * norm(start)
    recorded = [checkpoint.step for checkpoint in checkpoints]
    sums: list[Tree] = [{} for _ in checkpoints]

    def gradient_at(state: RunState) -> tuple[Tree, BatchLoss]:
        loss = BatchLoss(passes, replay.pairs(state.step).to(device), names)
        return loss.gradient({**state.params, **buffers}), loss

    # States are kept on the CPU, and one at a time is on the device.
    def onwards(state: RunState, steps: int) -> Iterator[RunState]:
        state = state.to(device)
        yield state
        for _ in range(steps):
            gradient, _ = gradient_at(state)
            state = advanced(state, gradient, replay.rates[state.step], replay.rule)
            yield state

    def back_through(states: list[RunState], after: Adjoint) -> Adjoint:
        for state in (state.to(device) for state in reversed(states)):
            gradient, loss = gradient_at(state)
            before, of_gradient = carried_back(after, state, gradient, replay.rates[state.step], replay.rule)
            bent = loss.hessian_product({**state.params, **buffers}, of_gradient)
            after = Adjoint(plus(before.params, bent), before.first, before.second)
            near = nearest_checkpoint(recorded, state.step)
            sums[near] = plus(sums[near], to_device(restricted(of_gradient, chosen), "cpu"))
            if not norm(after.params) < limit:
                raise StageError(
                    f"unrolled: going back through step {state.step + 1} the derivative grew {_GROWTH_LIMIT:.0e}-fold: "
                    "the run's learning rate is past stability (eta * lambda_max > 2); use score.replay: checkpoints"
                )
        return after

    anchors = [replay.initial, *checkpoints] if checkpoints[0].step > replay.initial.step else list(checkpoints)
    errors: list[float] = []
    for begin, end in reversed(list(itertools.pairwise(anchors))):
        steps = end.step - begin.step
        stride = math.isqrt(max(steps - 1, 0)) + 1
        kept = [RunState.of(begin, torch.device("cpu"))]
        for offset in range(0, steps, stride):
            kept.append(deque(onwards(kept[-1], min(stride, steps - offset)), maxlen=1).pop().to("cpu"))
        errors.append(_missed(kept.pop(), kept[0], end))
        for offset, state in zip(reversed(range(0, steps, stride)), reversed(kept), strict=True):
            between = onwards(state, min(stride, steps - offset) - 1)
            adjoint = back_through([each.to("cpu") for each in between], adjoint)
    facts = {"replay_error": max(errors, default=0.0)}
    return [ProbePlan([Probe(-1 / num_runs, along=("v",))], {"v": without_zeros(total)}, facts=facts) for total in sums]


def _missed(reached: RunState, begin: RunState, end: Checkpoint) -> float:
    """How far the replay ended from the recorded checkpoint, relative to the way."""
    target = {name: value.to(reached.params[name].device) for name, value in end.params.items()}
    way = norm(plus(target, begin.params, -1.0))
    error = norm(plus(reached.params, target, -1.0)) / way if way else 0.0
    if not error < _REPLAY_LIMIT:
        raise StageError(
            f"unrolled: the replay from step {begin.step} misses the checkpoint of step {end.step} by {error:.1%} of "
            "the way; the record is of another run, or the model trains differently than it evaluates (dropout, batch "
            "norm); use score.replay: checkpoints"
        )
    return error


def unrolled_from_checkpoints(
    model: nn.Module, checkpoints: Sequence[Checkpoint], batches: Batches, settings: Settings, num_runs: int
) -> list[ProbePlan]:
    """Directions from the checkpoints alone: each one's own Hessian stands for the steps nearest to it.

    With `A = P^1/2 H P^1/2` the steps of a stretch are `(1 - eta A)^n`, and the sum of their directions another
    function of `A`; both act in one Krylov subspace. Momentum is taken as settled: SGD's `eta` is
    `1 / (1 - beta)` times the rate. Weight decay is left out. Modes past stability (`eta lambda > 2`) count as died
    out, growing ones (negative curvature) grow at most e-fold per stretch.

    Raises `InputError` where checkpoints have momentum of an unknown `beta`.
    """
    plans: list[ProbePlan] = []
    carried: Tree | None = None
    steps = [checkpoint.step for checkpoint in checkpoints]
    for index in reversed(range(len(checkpoints))):
        here = LocalView(model, checkpoints[index], batches, settings)
        if carried is None:
            carried = here.target_loss.gradient(here.state)
        count, rate = stretch(checkpoints, index, steps)
        if count == 0 or norm(carried) == 0:
            plans.append(ProbePlan([Probe(1 / num_runs, along=("v",))], {"v": {}}))
            continue
        operator, root = here.scaled_hessian()
        params = here.params
        space = krylov(operator, root * flattened(carried, params), _KRYLOV_STEPS)
        root = root.cpu()
        modes = Modes(rate, count)
        direction = unflattened(root * space.apply(modes.summed), params)
        carried = to_device(unflattened(space.apply(modes.carried) / root, params), here.device)
        facts = {
            "eta_lambda_max": rate * float(space.values[-1]),
            "damped_modes": int(modes.damped(space.values).sum()),
            "krylov": len(space.values),
        }
        plans.append(ProbePlan([Probe(1 / num_runs, along=("v",))], {"v": without_zeros(direction)}, facts=facts))
    return plans[::-1]


def stretch(checkpoints: Sequence[Checkpoint], index: int, steps: Sequence[int]) -> tuple[int, float]:
    """How many steps are nearest to a checkpoint, and how long they are on average in units of the gradient."""
    near = [step for step in range(max(steps)) if nearest_checkpoint(steps, step) == index]
    rates = [_rate_at(checkpoints, step + 1) for step in near]
    return len(near), sum(rates) / len(rates) if rates else 0.0


def _rate_at(checkpoints: Sequence[Checkpoint], step: int) -> float:
    """Length of the step that led to `step`: interpolated linearly, constant before the first and after the last."""
    for before, after in itertools.pairwise(checkpoints):
        if before.step <= step <= after.step:
            share = (step - before.step) / (after.step - before.step)
            return _rate(before) + share * (_rate(after) - _rate(before))
    return _rate(checkpoints[0] if step < checkpoints[0].step else checkpoints[-1])


def _rate(checkpoint: Checkpoint) -> float:
    """Length of the last step in units of the gradient, momentum settled."""
    if checkpoint.gain is None:
        raise InputError(
            f"checkpoint of step {checkpoint.step}: expected the beta of SGD's momentum beside its buffers, found none "
            "(files of an earlier version): unrolled needs the proxy trained again, in another `out`"
        )
    return checkpoint.lr * checkpoint.gain


@dataclass(frozen=True)
class Modes:
    """What `count` steps of rate `rate` do to an eigenvector of the Hessian, by its eigenvalue."""

    rate: float
    count: int

    def factor(self, values: Tensor) -> Tensor:
        """Of one step: `1 - eta lambda`, damped where the run could not have followed it."""
        plain = 1 - self.rate * values
        growth = math.exp(1 / self.count)
        return torch.where(self.rate * values > 2, torch.zeros_like(plain), plain.clamp(max=growth))

    def damped(self, values: Tensor) -> Tensor:
        """Bool: modes that are not treated as the formula has it."""
        return self.factor(values) != 1 - self.rate * values

    def carried(self, values: Tensor) -> Tensor:
        """`(1 - eta lambda)^n`."""
        return self.factor(values) ** self.count

    def summed(self, values: Tensor) -> Tensor:
        """`eta (1 + f + ... + f^(n-1))`."""
        factor = self.factor(values)
        powers = factor[:, None] ** torch.arange(self.count, dtype=factor.dtype, device=factor.device)
        return self.rate * powers.sum(1)
