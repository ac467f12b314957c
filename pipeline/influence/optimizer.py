"""One optimizer step forwards, and the derivative of what follows it carried back through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.influence.trees import dot, norm, scaled, tree_map
from pipeline.literals import OptimizerName
from pipeline.types import Checkpoint, Tree


@dataclass(frozen=True)
class StepRule:
    """The optimizer of a run, as `torch.optim` computes it.

    Attributes:
        optimizer: AdamW or SGD.
        weight_decay: decoupled decay of each parameter, with either optimizer: `theta *= 1 - rate * decay`.
        beta1: AdamW's.
        beta2: AdamW's.
        eps: AdamW's.
        momentum: SGD's.
        grad_clip: norm to which the gradient is clipped, or None.
    """

    optimizer: OptimizerName
    weight_decay: dict[str, float]
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    momentum: float = 0.0
    grad_clip: float | None = None


@dataclass(frozen=True)
class RunState:
    """A run's state between two steps.

    Attributes:
        step: steps of the run so far.
        params: the parameters.
        first: Adam's first moment, or SGD's momentum.
        second: Adam's second moment.
        updates: steps that the moments have seen: more than `step` in a run that went on with another's moments.
    """

    step: int
    params: Tree
    first: Tree
    second: Tree
    updates: int

    @staticmethod
    def of(checkpoint: Checkpoint, device: torch.device) -> RunState:
        """The state that a checkpoint records; moments that it lacks are zero, as before the first step."""
        params = {name: value.to(device) for name, value in checkpoint.params.items()}
        zeros = tree_map(torch.zeros_like, params)
        first, second, updates = zeros, zeros, checkpoint.step
        if checkpoint.adam is not None:
            updates = checkpoint.adam.steps
            first = {name: checkpoint.adam.exp_avg[name].to(device) for name in params}
            second = {name: checkpoint.adam.exp_avg_sq[name].to(device) for name in params}
        elif checkpoint.momentum is not None:
            first = {name: checkpoint.momentum[name].to(device) for name in params}
        return RunState(checkpoint.step, params, first, second, updates)

    def to(self, device: torch.device | str) -> RunState:
        """The same state on another device."""
        params, first, second = (
            {name: value.to(device) for name, value in tree.items()} for tree in (self.params, self.first, self.second)
        )
        return RunState(self.step, params, first, second, self.updates)


def clip_factor(gradient: Tree, rule: StepRule) -> Tensor | float:
    """What `clip_grad_norm_` multiplies the gradient with: a float64 scalar that moves as the gradient does."""
    if rule.grad_clip is None:
        return 1.0
    return (rule.grad_clip / (dot(gradient, gradient).sqrt() + 1e-6)).clamp(max=1)


def advanced(state: RunState, gradient: Tree, rate: float, rule: StepRule) -> RunState:
    """The state after a step with this raw gradient."""
    factor = clip_factor(gradient, rule)
    params: Tree = {}
    first: Tree = {}
    second: Tree = {}
    for name, value in state.params.items():
        g = gradient[name] * factor
        kept = value * (1 - rate * rule.weight_decay.get(name, 0.0))
        if rule.optimizer == "sgd":
            first[name] = rule.momentum * state.first[name] + g
            second[name] = state.second[name]
            params[name] = kept - rate * first[name]
            continue
        first[name] = rule.beta1 * state.first[name] + (1 - rule.beta1) * g
        second[name] = rule.beta2 * state.second[name] + (1 - rule.beta2) * g * g
        corrections = 1 - rule.beta1 ** (state.updates + 1), 1 - rule.beta2 ** (state.updates + 1)
        spread = torch.sqrt(second[name] / corrections[1]) + rule.eps
        params[name] = kept - rate / corrections[0] * first[name] / spread
    return RunState(state.step + 1, params, first, second, state.updates + 1)


@dataclass(frozen=True)
class Adjoint:
    """Derivative of the final loss with respect to a run's state at one step."""

    params: Tree
    first: Tree
    second: Tree


def carried_back(after: Adjoint, before: RunState, gradient: Tree, rate: float, rule: StepRule) -> tuple[Adjoint, Tree]:
    """Carry an adjoint from after a step to before it.

    Returns:
        the adjoint before the step *without* what flows through the gradient's own dependence on the parameters, and
        the derivative with respect to the raw gradient `d`; the caller adds `H d` to the adjoint of the parameters.
    """
    factor = float(clip_factor(gradient, rule))
    of_params: Tree = {}
    of_first: Tree = {}
    of_second: Tree = {}
    of_clipped: Tree = {}
    for name, u in after.params.items():
        g = gradient[name] * factor
        of_params[name] = u * (1 - rate * rule.weight_decay.get(name, 0.0))
        if rule.optimizer == "sgd":
            of_clipped[name] = after.first[name] - rate * u
            of_first[name] = rule.momentum * of_clipped[name]
            of_second[name] = after.second[name]
            continue
        of_clipped[name], of_first[name], of_second[name] = _through_adam(
            u,
            after.first[name],
            after.second[name],
            before.first[name],
            before.second[name],
            g,
            before.updates,
            rate,
            rule,
        )
    return Adjoint(of_params, of_first, of_second), _through_clipping(of_clipped, gradient, factor, rule)


def _through_adam(
    u: Tensor, a1: Tensor, a2: Tensor, m: Tensor, v: Tensor, g: Tensor, updates: int, rate: float, rule: StepRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives with respect to the gradient and the two moments before the step."""
    m = rule.beta1 * m + (1 - rule.beta1) * g
    v = rule.beta2 * v + (1 - rule.beta2) * g * g
    rate = rate / (1 - rule.beta1 ** (updates + 1))
    root = torch.sqrt(v / (1 - rule.beta2 ** (updates + 1)))
    spread = root + rule.eps
    of_m = a1 - u * rate / spread
    # d root / d v = 1 / (2 root correction); a parameter that never had a gradient has root 0 and moves by m alone.
    slope = torch.where(root > 0, 0.5 / (root * (1 - rule.beta2 ** (updates + 1))), torch.zeros_like(root))
    slope = torch.where(slope.isfinite(), slope, torch.zeros_like(slope))
    of_v = a2 + u * rate * m / spread.square() * slope
    of_g = (1 - rule.beta1) * of_m + 2 * (1 - rule.beta2) * g * of_v
    return of_g, rule.beta1 * of_m, rule.beta2 * of_v


def _through_clipping(of_clipped: Tree, gradient: Tree, factor: float, rule: StepRule) -> Tree:
    if factor == 1.0 or rule.grad_clip is None:
        return of_clipped
    length = norm(gradient)
    along = float(dot(gradient, of_clipped)) * -rule.grad_clip / ((length + 1e-6) ** 2 * length)
    kept = scaled(of_clipped, factor)
    return {name: kept[name] + along * gradient[name] for name in kept}
