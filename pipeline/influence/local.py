"""What the estimators need of one checkpoint: its tensors, the preconditioner, and the losses of `B` and `V` there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.lanczos import Operator
from pipeline.influence.parameters import chosen_names
from pipeline.influence.passes import Passes
from pipeline.influence.settings import Batches, Settings
from pipeline.influence.trees import flattened, moved, norm, plus, restricted, times, to_device, tree_map, unflattened
from pipeline.types import Checkpoint, Tree


class LocalView:
    """One checkpoint on the model's device.

    Attributes:
        device: the model's.
        state: parameters and buffers.
        names: parameters that directions live on.
        preconditioner: `P` of AdamW, or None for SGD's form (`P = 1`).
        gradient_loss: the mean loss of `B`.
        target_loss: the mean loss of `V`, or minus its margin.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, batches: Batches, settings: Settings) -> None:
        self.device = device = next(model.parameters()).device
        self.checkpoint = checkpoint
        self.settings = settings
        # Directions serve all pairs: they are computed once and in full precision.
        self.passes = Passes(model, replace(settings, precision="fp32"))
        self.state = to_device({**checkpoint.params, **checkpoint.buffers}, device)
        self.names = chosen_names(checkpoint.params, settings.parameters)
        self.gradient_loss = BatchLoss(self.passes, batches.gradient.to(device), self.names)
        self.target_loss = BatchLoss(self.passes, batches.target.to(device), self.names, settings.target_loss)
        diagonal = preconditioner(checkpoint, settings)
        self.preconditioner = None if diagonal is None else to_device(restricted(diagonal, self.names), device)

    @property
    def params(self) -> Tree:
        """The parameters that directions live on."""
        return restricted(self.state, self.names)

    def preconditioned(self, vector: Tree) -> Tree:
        """`P v`."""
        return vector if self.preconditioner is None else times(vector, self.preconditioner)

    def scaled_hessian(self) -> tuple[Operator, Tensor]:
        """`P^1/2 H_B P^1/2` on vectors `[p]`, entries in the order of `params`, and the diagonal of `P^1/2` `[p]`."""
        params = self.params
        root = flattened(self.preconditioned(tree_map(torch.ones_like, params)), params).sqrt()

        def operator(flat: Tensor) -> Tensor:
            product = self.gradient_loss.hessian_product(self.state, unflattened(root * flat, params))
            return root * flattened(product, params)

        return operator, root

    def moved(self, vector: Tree, step: float) -> Tree:
        """The state at `theta + step * vector`."""
        return moved(self.state, vector, step)

    def step_for(self, vector: Tree, order: int) -> float:
        """Step `h` along a vector for a central difference of what is rounded to `r`, the precision of the passes.

        The rounding error grows as `r / h`, the formula's own as `h^2`: they balance at `r^(1/3)` of the scale on which
        the loss varies; for losses differenced in two directions (`order` 2) at `r^(1/4)`. That scale is
        `|G_B| / |H_B v|`, the way along `v` after which the gradient has changed by as much as it was long.
        """
        length = norm(vector)
        if length == 0:
            return 1.0
        dtype = next(iter(vector.values())).dtype
        trial = torch.finfo(dtype).eps ** 0.5 * norm(restricted(self.state, vector)) / length
        here, there = (self.gradient_loss.gradient(state) for state in (self.state, self.moved(vector, trial)))
        bend = norm(plus(there, here, -1.0)) / trial
        scale = norm(here) / bend if bend > 0 else norm(restricted(self.state, vector)) / length
        relative: float = self.settings.roundoff(dtype) ** (1 / (2 + order))
        return relative * scale


def preconditioner(checkpoint: Checkpoint, settings: Settings) -> Tree | None:
    """`P = 1 / (sqrt(v) + eps)` with `v` bias-corrected, or None where SGD's form is used.

    Raises `InputError` when `precondition` is `adam` and the checkpoint has no Adam state.
    """
    if settings.precondition == "none":
        return None
    adam = checkpoint.adam
    if adam is None:
        if settings.precondition == "adam":
            raise InputError(
                f"checkpoint of step {checkpoint.step}: expected Adam's state, found none; use score.precondition: none"
            )
        return None
    correction = 1 - adam.beta2**adam.steps
    return tree_map(lambda v: 1 / (torch.sqrt(v / correction) + adam.eps), adam.exp_avg_sq)
