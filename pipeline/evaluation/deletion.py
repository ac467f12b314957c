"""Deletion: the model without a set of pairs, estimated instead of retrained.

`theta - c * (summed parameter influence)`, with the one factor `c` fitted on a deletion held out for it. Beside it what
needs no influence: a step of fine-tuning on the pairs that are left, its length fitted in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.arrays import Bool
from pipeline.evaluation.small_run import SmallRun
from pipeline.influence import Settings
from pipeline.influence.forward_mode import push_forward
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.local import preconditioner
from pipeline.influence.optimizer import RunState, advanced
from pipeline.influence.passes import Passes
from pipeline.influence.trees import dot, norm, plus, times, tree_map
from pipeline.types import Checkpoint, Tree


@dataclass(frozen=True)
class Deletion:
    """How well the outcome of one deletion was estimated.

    Attributes:
        method: whose parameter influence, or `fine-tuning`.
        predicted: change of the target loss at the estimated parameters.
        true: change of the target loss at the retrained ones.
        distance: from the estimated to the retrained parameters, as a share of the distance from the undeleted model to
            the retrained ones (1 is what no influence at all achieves).
    """

    method: str
    predicted: float
    true: float
    distance: float


def random_deletions(n: int, count: int, share: float, seed: int) -> Bool:
    """`count` random sets of `share` of `n` pairs, bool `[count, n]`."""
    rng = np.random.default_rng(seed)
    sets = np.zeros((count, n), dtype=bool)
    for row in sets:
        row[rng.choice(n, size=max(1, round(share * n)), replace=False)] = True
    return sets


def deletions(run: SmallRun, recorded: Sequence[int], settings: Settings, sets: Bool) -> list[Deletion]:
    """Estimate each set's deletion by every method and compare with retraining; the first set only fits `c`."""
    stacked = run.retrained(torch.from_numpy(sets))
    full = run.states[-1].params
    retrained = [{name: value[row] for name, value in stacked.items()} for row in range(len(sets))]
    true = run.target_losses(stacked)
    before = run.target_losses({name: value[None] for name, value in full.items()})[0]
    found: list[Deletion] = []
    for method, moves in _METHODS.items():
        steps = [moves(run, recorded, settings, chosen) for chosen in sets]
        moved = plus(retrained[0], full, -1.0)
        length = float(dot(steps[0], steps[0]))
        factor = float(dot(steps[0], moved)) / length if length else 0.0
        for row in range(1, len(sets)):
            estimated = plus(full, steps[row], factor)
            loss = run.target_losses({name: value[None] for name, value in estimated.items()})[0]
            left = norm(plus(estimated, retrained[row], -1.0)) / norm(plus(full, retrained[row], -1.0))
            found.append(Deletion(method, float(loss - before), float(true[row] - before), left))
    return found


class _Group:
    """Gradient and Hessian products of a deleted set: those of the whole loss without those of the loss of the rest."""

    def __init__(self, run: SmallRun, settings: Settings, chosen: Bool) -> None:
        passes = Passes(run.model, settings)
        names = list(run.start.params)
        self.share = 1 - float(chosen.mean())
        self.all = BatchLoss(passes, run.data, names)
        self.rest = BatchLoss(passes, run.data[torch.from_numpy(~chosen)], names)

    def gradient(self, state: Tree) -> Tree:
        """`sum of G_z over the set / n`."""
        return plus(self.all.gradient(state), self.rest.gradient(state), -self.share)

    def hessian_product(self, state: Tree, vector: Tree) -> Tree:
        """`sum of H_z v over the set / n`."""
        return plus(self.all.hessian_product(state, vector), self.rest.hessian_product(state, vector), -self.share)


def _by_fine_tuning(run: SmallRun, recorded: Sequence[int], settings: Settings, chosen: Bool) -> Tree:
    """A step down the loss of the pairs that are left, at the end of the run: no influence in it."""
    group = _Group(run, settings, chosen)
    _, state, scale = _views(run, recorded[-1:], settings)[0]
    return tree_map(torch.neg, scale(group.rest.gradient(state)))


def _by_tracin(run: SmallRun, recorded: Sequence[int], settings: Settings, chosen: Bool) -> Tree:
    """`sum_t eta_t P G_D`: the pushes of the set, as if nothing came after them."""
    group, total = _Group(run, settings, chosen), dict[str, torch.Tensor]()
    for checkpoint, state, scale in _views(run, recorded, settings):
        total = plus(total, scale(group.gradient(state)), checkpoint.lr)
    return total


def _by_diff_in(run: SmallRun, recorded: Sequence[int], settings: Settings, chosen: Bool) -> Tree:
    """Eq. 9's parameter influence `sum_t a_t P (H_B P G_D + H_D P G_B)`; its sign is left to the factor."""
    group, total = _Group(run, settings, chosen), dict[str, torch.Tensor]()
    for checkpoint, state, scale in _views(run, recorded, settings):
        of_group = group.all.hessian_product(state, scale(group.gradient(state)))
        of_batch = group.hessian_product(state, scale(group.all.gradient(state)))
        total = plus(total, scale(plus(of_group, of_batch)), checkpoint.step * checkpoint.lr**2)
    return total


def _by_unrolling(run: SmallRun, recorded: Sequence[int], settings: Settings, chosen: Bool) -> Tree:
    """The change of gradient that the deletion makes at every step, carried forwards through the run's own steps."""
    passes = Passes(run.model, settings)
    replay, device = run.replay(), torch.device("cpu")
    names = list(run.start.params)
    absent = torch.from_numpy(chosen)
    zeros = tree_map(torch.zeros_like, run.start.params)
    change: tuple[Tree, Tree, Tree] = (zeros, zeros, zeros)
    for step, rate in enumerate(run.recipe.rates):
        checkpoint = run.states[step]
        state = RunState.of(checkpoint, device)
        everything = {**state.params, **checkpoint.buffers}
        batch = run.batch(step)
        whole = BatchLoss(passes, batch, names)
        gradient = whole.gradient(everything)
        slope = whole.hessian_product(everything, change[0])
        kept = ~absent[run.recipe.order[step]]
        if not bool(kept.all()):
            rest = BatchLoss(passes, batch[kept], names).gradient(everything)
            slope = plus(slope, plus(rest, gradient, -1.0))

        def after(params: Tree, first: Tree, second: Tree, g: Tree, at: RunState = state, rate: float = rate) -> Any:
            moved = advanced(replace(at, params=params, first=first, second=second), g, rate, replay.rule)
            return moved.params, moved.first, moved.second

        state_now = (state.params, state.first, state.second, gradient)
        _, moved = push_forward(after, state_now, (*change, slope))
        # A parameter without any gradient has a square root of zero under Adam, whose slope is infinite.
        first, second, third = (tree_map(lambda v: v.nan_to_num(0, 0, 0), tree) for tree in moved)
        change = (first, second, third)
    return change[0]


def _views(
    run: SmallRun, recorded: Sequence[int], settings: Settings
) -> list[tuple[Checkpoint, Tree, Callable[[Tree], Tree]]]:
    found: list[tuple[Checkpoint, Tree, Callable[[Tree], Tree]]] = []
    for step in recorded:
        checkpoint = run.states[step]
        diagonal = preconditioner(checkpoint, settings)

        def scale(vector: Tree, diagonal: Tree | None = diagonal) -> Tree:
            return vector if diagonal is None else times(vector, diagonal)

        found.append((checkpoint, {**checkpoint.params, **checkpoint.buffers}, scale))
    return found


_METHODS: dict[str, Callable[[SmallRun, Sequence[int], Settings, Bool], Tree]] = {
    "fine-tuning": _by_fine_tuning,
    "diff-in": _by_diff_in,
    "tracin": _by_tracin,
    "unrolled (every step)": _by_unrolling,
}
