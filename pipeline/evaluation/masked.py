"""Many counterfactual trainings at once: the same run, each time without some of the pairs.

Leave-one-out and random halves are one computation: a 0/1 mask over the pairs per training, everything else (start,
order, learning rates) equal. The trainings are stacked along a first dimension and advanced together by
`torch.func.vmap`, so that small models fill the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.influence.arithmetic import attention_in_parts
from pipeline.influence.losses import batch_loss, margin_loss, similar_captions
from pipeline.influence.optimizer import StepRule
from pipeline.literals import Family, TargetLoss
from pipeline.types import AdamState, Checkpoint, Features, PairBatch, Tree

#: Attributes of open_clip's text towers that are numbers of tokens: the text's end, and padding.
_SOUGHT = ("text_eos_id", "eos_id", "pad_id")


@dataclass(frozen=True)
class Recipe:
    """How every counterfactual is trained.

    Attributes:
        order: int64 `[steps, batch]`, the rows of each step.
        rates: learning rate of each step.
        rule: the optimizer; a norm to clip to is each training's own.
        family: `clip` or `siglip`.
        ignore_equal_captions: whether equal captions are not each other's negatives.
        target_loss: what of the target set is the outcome of a training.
    """

    order: Tensor
    rates: list[float]
    rule: StepRule
    family: Family = "clip"
    ignore_equal_captions: bool = False
    target_loss: TargetLoss = "contrastive"


def compact_vocabulary(model: nn.Module, batches: list[PairBatch]) -> tuple[nn.Module, list[PairBatch]]:
    """Shrink the token embedding to the tokens in use, and renumber them in order.

    Unused rows never receive a gradient, so training is unchanged; stacking a hundred models becomes affordable.
    The order of token numbers is kept because open_clip finds the end of a text by the largest number, and 0 stays 0
    because captions are cut where only zeros follow. A tower that looks for a given number looks for its new one.
    """
    embeddings = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("token_embedding")
    }
    if len(embeddings) != 1:  # a text tower of another library: it stays as it is
        return model, batches
    ((name, embedding),) = embeddings.items()
    parent, _, leaf = name.rpartition(".")
    tower = model.get_submodule(parent)
    sought = {key: value for key in _SOUGHT if 0 <= (value := getattr(tower, key, -1)) < embedding.num_embeddings}
    kept = torch.tensor([0, *sought.values()])
    used = torch.unique(torch.cat([kept, *(batch.tokens.flatten() for batch in batches)]))
    small = nn.Embedding(len(used), embedding.embedding_dim, dtype=embedding.weight.dtype)
    small.weight.data.copy_(embedding.weight.data[used])
    setattr(tower, leaf, small)
    for key, value in sought.items():
        setattr(tower, key, int(torch.searchsorted(used, value)))
    return model, [replace(batch, tokens=torch.searchsorted(used, batch.tokens)) for batch in batches]


def masked_loss(features: Features, keep: Tensor, captions: Tensor, recipe: Recipe) -> Tensor:
    """Contrastive loss of the kept pairs of a batch, as if the others had not been in it.

    Args:
        features: of `b` pairs.
        keep: `[b]`, 1 for pairs that are in.
        captions: int64 `[b]` caption hashes.

    Returns the mean over the kept pairs (0 when none is kept).
    """
    absent = keep == 0
    excluded = absent[:, None] | absent[None, :] | similar_captions(captions, captions, recipe.ignore_equal_captions)
    total = batch_loss(features, excluded, recipe.family) * len(keep)
    if recipe.family == "siglip":  # without negatives an absent pair still has its positive term there
        positive = features.scale * (features.image * features.text).sum(1) + features.bias
        total = total - (nn.functional.softplus(-positive, threshold=50) * absent).sum()
    return total / keep.sum().clamp(min=1)


def train_masked(
    model: nn.Module,
    start: Checkpoint,
    data: PairBatch,
    masks: Tensor,
    recipe: Recipe,
    at_step: Callable[[int, Tree, Tree, Tree], None] | None = None,
    removal: float = 1.0,
) -> Tree:
    """Train one model per row of `masks [M, n]` (1 = the pair is in) and return their parameters, stacked `[M, ...]`.

    Adam's moments are those of `start`, or empty where it has none.

    Args:
        model: run at each row's parameters.
        start: where every training begins.
        data: the pairs.
        masks: `[M, n]`.
        recipe: how they are trained.
        at_step: `at_step(t, params, exp_avg, exp_avg_sq)` is called after every step `t` with the stacked state.
        removal: 1 leaves the masked pairs out; less mixes in as much of the gradient without them, and the whole
            batch's for the rest.
    """
    count = len(masks)
    stacked = _repeated(start.params, count)
    zeros = {name: torch.zeros_like(value) for name, value in start.params.items()}
    adam = start.adam
    first = _repeated(zeros if adam is None else adam.exp_avg, count)
    second = _repeated(zeros if adam is None else adam.exp_avg_sq, count)
    updates = 0 if adam is None else adam.steps

    def loss(params: Tree, keep: Tensor, images: Tensor, tokens: Tensor, captions: Tensor) -> Tensor:
        features = functional_call(model, {**params, **start.buffers}, (images, tokens))
        without = masked_loss(features, keep, captions, recipe)
        if removal == 1:
            return without
        return removal * without + (1 - removal) * masked_loss(features, torch.ones_like(keep), captions, recipe)

    gradients = vmap(grad(loss), in_dims=(0, 0, None, None, None))
    for step, rows in enumerate(recipe.order, start=1):
        batch = data[rows]
        with sdpa_kernel(SDPBackend.MATH), attention_in_parts():
            gradient = gradients(stacked, masks[:, rows], batch.images, batch.tokens, batch.captions)
        with torch.no_grad():
            _advance(stacked, first, second, gradient, updates + step, recipe.rates[step - 1], recipe.rule)
        if at_step is not None:
            at_step(step, stacked, first, second)
    return stacked


def _repeated(tree: Tree, count: int) -> Tree:
    return {name: value.expand(count, *value.shape).clone() for name, value in tree.items()}


def _advance(
    params: Tree, first: Tree, second: Tree, gradient: Tree, updates: int, rate: float, rule: StepRule
) -> None:
    """The moments' step number `updates` of SGD or AdamW (Loshchilov & Hutter, Algorithm 2), on stacked parameters."""
    factor = _clip_factors(gradient, rule.grad_clip)
    for name, value in params.items():
        g = gradient[name]
        if factor is not None:
            g = g * factor.reshape(-1, *[1] * (g.ndim - 1))
        if decay := rule.weight_decay.get(name, 0.0):
            value.mul_(1 - rate * decay)
        if rule.optimizer == "sgd":
            first[name].mul_(rule.momentum).add_(g)
            value.sub_(rate * first[name])
            continue
        first[name].lerp_(g, 1 - rule.beta1)
        second[name].mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
        denominator = (second[name] / (1 - rule.beta2**updates)).sqrt_().add_(rule.eps)
        value.addcdiv_(first[name], denominator, value=-rate / (1 - rule.beta1**updates))


def _clip_factors(gradient: Tree, limit: float | None) -> Tensor | None:
    """What each training's gradient is multiplied with, `[M]` (as `clip_grad_norm_`); None where nothing is clipped."""
    if limit is None:
        return None
    squares = torch.stack([value.reshape(len(value), -1).square().sum(1) for value in gradient.values()])
    return (limit / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1)


def checkpoint_of(
    row: int, step: int, lr: float, params: Tree, first: Tree, second: Tree, start: Checkpoint, rule: StepRule
) -> Checkpoint:
    """One training out of the stack as a `Checkpoint`."""
    adam = None
    if rule.optimizer == "adamw":
        adam = AdamState(
            steps=step + (start.adam.steps if start.adam is not None else 0),
            exp_avg={name: value[row].clone() for name, value in first.items()},
            exp_avg_sq={name: value[row].clone() for name, value in second.items()},
            beta1=rule.beta1,
            beta2=rule.beta2,
            eps=rule.eps,
        )
    momentum, gain = None, 1.0
    if rule.optimizer == "sgd" and rule.momentum:
        momentum = {name: value[row].clone() for name, value in first.items()}
        gain = 1 / (1 - rule.momentum)
    own = {name: value[row].clone() for name, value in params.items()}
    return Checkpoint(step, lr, start.run, own, start.buffers, adam, momentum, gain)


def target_losses(model: nn.Module, stacked: Tree, buffers: Tree, target: PairBatch, recipe: Recipe) -> Tensor:
    """Mean loss of the target set under each of the stacked models, `[M]`."""
    everyone = torch.ones(len(target), dtype=next(iter(stacked.values())).dtype)
    equal = similar_captions(target.captions, target.captions, recipe.ignore_equal_captions)

    def loss(params: Tree) -> Tensor:
        features = functional_call(model, {**params, **buffers}, (target.images, target.tokens))
        if recipe.target_loss == "margin":
            return margin_loss(features, equal)
        return masked_loss(features, everyone, target.captions, recipe)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), attention_in_parts():
        return vmap(loss)(stacked)
