"""The formulas written out with explicit per-sample gradients and Hessians: what the engine must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev

from pipeline.influence.settings import Batches, Settings
from pipeline.types import Checkpoint, PairBatch, Tree
from tests.influence.towers import mean_loss, target_loss


def literal_pair_loss(
    model: nn.Module, state: Tree, pair: PairBatch, reference: PairBatch, settings: Settings
) -> Tensor:
    """`l_z` from its definition by two batch losses (marginal) or two cross-entropies (row); one pair."""
    others = reference[reference.ids != pair.ids[0]]
    joint = PairBatch.cat([others, pair])
    n = len(joint)
    if settings.loss == "marginal":
        whole = mean_loss(model, state, joint, settings)
        return n * whole - (n - 1) * mean_loss(model, state, others, settings)
    image, text, scale, bias = functional_call(model, state, (joint.images, joint.tokens))
    total = torch.zeros((), dtype=image.dtype)
    for left, right in ((image, text), (text, image)):
        logits = scale * right @ left[-1] + bias
        allowed = torch.ones(n, dtype=torch.bool)
        if settings.equal_captions == "ignore":
            allowed = joint.captions != pair.captions[0]
            allowed[-1] = True
        if settings.family == "clip":
            total = total - torch.log(torch.exp(logits[-1]) / torch.exp(logits[allowed]).sum()) / 2
        else:
            signs = -torch.ones(n, dtype=logits.dtype)
            signs[-1] = 1
            total = total - torch.log(torch.sigmoid(signs * logits))[allowed].sum() / 2
    return total


@dataclass
class Explicit:
    """Gradients and Hessians at one checkpoint, over all parameters flattened in their order."""

    model: nn.Module
    checkpoint: Checkpoint
    settings: Settings

    @property
    def theta(self) -> Tensor:
        return torch.cat([value.reshape(-1) for value in self.checkpoint.params.values()])

    def tree(self, vector: Tensor) -> Tree:
        params = self.checkpoint.params
        parts = vector.split([value.numel() for value in params.values()])
        return {name: part.view(params[name].shape) for name, part in zip(params, parts, strict=True)}

    def batch(self, batch: PairBatch, order: int) -> Tensor:
        """Gradient (order 1) or Hessian (2) of the mean loss of a batch."""
        return self._differentiate(lambda v: mean_loss(self.model, self.tree(v), batch, self.settings), order)

    def target(self, batch: PairBatch) -> Tensor:
        """Gradient of what of the target is differentiated."""
        return self._differentiate(lambda v: target_loss(self.model, self.tree(v), batch, self.settings), 1)

    def pairs(self, pairs: PairBatch, reference: PairBatch, order: int) -> Tensor:
        """Values (0), gradients (1) or Hessians (2) of the losses of pairs, one by one against R; `[b, ...]`."""

        def losses(v: Tensor) -> Tensor:
            each = [pairs[index : index + 1] for index in range(len(pairs))]
            return torch.stack(
                [literal_pair_loss(self.model, self.tree(v), pair, reference, self.settings) for pair in each]
            )

        return self._differentiate(losses, order)

    @torch.no_grad()
    def _differentiate(self, function, order: int) -> Tensor:
        for derivative in (jacrev, jacfwd)[:order]:
            function = derivative(function)
        return function(self.theta)

    def preconditioner(self) -> Tensor:
        """Diagonal of `P`: ones where SGD's form is asked for."""
        adam = self.checkpoint.adam
        if self.settings.precondition == "none" or adam is None:
            return torch.ones_like(self.theta)
        second = torch.cat([value.reshape(-1) for value in adam.exp_avg_sq.values()])
        return 1 / (torch.sqrt(second / (1 - adam.beta2**adam.steps)) + adam.eps)

    def diff_in(self, pairs: PairBatch, batches: Batches, dataset_size: int, num_checkpoints: int) -> Tensor:
        """Eq. 9's term of every pair, `[b]`."""
        t, eta = self.checkpoint.step, self.checkpoint.lr
        factor = -t * eta**2 / (dataset_size * num_checkpoints)
        P = self.preconditioner()
        g_V = self.target(batches.target)
        G_B, H_B = self.batch(batches.gradient, 1), self.batch(batches.gradient, 2)
        G, H = self.pairs(pairs, batches.reference, 1), self.pairs(pairs, batches.reference, 2)
        return factor * torch.stack(
            [g_V @ (P * (H_B @ (P * G_z))) + g_V @ (P * (H_z @ (P * G_B))) for G_z, H_z in zip(G, H, strict=True)]
        )
