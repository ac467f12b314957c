"""A two-tower model small enough for explicit Hessians, batches for it, and checkpoints of a short training run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from pipeline.influence.losses import batch_loss, similar_captions
from pipeline.influence.settings import Settings
from pipeline.types import AdamState, Checkpoint, Features, PairBatch, Tree


class SmallTowers(nn.Module):
    """Images `[n, 3, 2, 2]` and 4 tokens of 8, each through one hidden layer, into 3 dimensions; 148 parameters."""

    def __init__(self, seed: int = 0, bias: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.visual = nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
            self.token_embedding = nn.Embedding(8, 4)
            self.text_projection = nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.2))
        if bias:
            self.logit_bias = nn.Parameter(torch.tensor(-1.5))
        self.to(dtype)

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        pixels = images.to(self.logit_scale.dtype).flatten(1) / 128 - 1
        image = normalize(self.visual(pixels), dim=-1)
        text = normalize(self.text_projection(torch.tanh(self.token_embedding(tokens).mean(1) * 2)), dim=-1)
        bias = getattr(self, "logit_bias", torch.zeros_like(self.logit_scale))
        return Features(image, text, self.logit_scale.exp(), bias)


def make_pairs(count: int, seed: int, first_id: int = 0, captions: int | None = None, size: int = 2) -> PairBatch:
    """Random pairs with ids from `first_id` on; `captions` limits how many different captions there are."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 8, (captions or count, 4), generator=generator)
    which = torch.arange(count) % len(tokens)
    return PairBatch(images, tokens[which], torch.arange(first_id, first_id + count), which + 1000 * seed)


def state_of(model: nn.Module) -> Tree:
    """The model's parameters, cloned."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def mean_loss(model: nn.Module, state: Tree, batch: PairBatch, settings: Settings) -> Tensor:
    """The mean contrastive loss of a batch, differentiable in `state`."""
    features = functional_call(model, state, (batch.images, batch.tokens))
    excluded = similar_captions(batch.captions, batch.captions, settings.equal_captions == "ignore")
    return batch_loss(features, excluded, settings.family)


def target_loss(model: nn.Module, state: Tree, batch: PairBatch, settings: Settings) -> Tensor:
    """What of a target batch is differentiated: its mean loss, or minus its margin, pair by pair."""
    if settings.target_loss == "contrastive":
        return mean_loss(model, state, batch, settings)
    image, text, *_ = functional_call(model, state, (batch.images, batch.tokens))
    total = torch.zeros((), dtype=image.dtype)
    for i, caption in enumerate(batch.captions):
        ignore = settings.equal_captions == "ignore"
        counted = [j for j, other in enumerate(batch.captions) if j == i or not (ignore and other == caption)]
        as_image = torch.stack([image[i] @ text[j] for j in counted]).mean()
        as_text = torch.stack([image[j] @ text[i] for j in counted]).mean()
        total = total + (as_image + as_text) / 2 - image[i] @ text[i]
    return total / len(batch)


def trained(model: nn.Module, batch: PairBatch, settings: Settings, steps: tuple[int, ...]) -> list[Checkpoint]:
    """Checkpoints after these many AdamW steps on random halves of the batch, with Adam's state."""
    state = {name: value.requires_grad_() for name, value in state_of(model).items()}
    optimizer = torch.optim.AdamW(list(state.values()), lr=0.02, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    found: list[Checkpoint] = []
    for step in range(1, max(steps) + 1):
        optimizer.param_groups[0]["lr"] = 0.03 / step**0.5
        rows = torch.randperm(len(batch), generator=generator)[: len(batch) // 2]
        optimizer.zero_grad()
        mean_loss(model, state, batch[rows], settings).backward()
        optimizer.step()
        if step in steps:
            moments = {
                key: {n: optimizer.state[v][key].clone() for n, v in state.items()} for key in ("exp_avg", "exp_avg_sq")
            }
            found.append(
                Checkpoint(
                    step=step,
                    lr=optimizer.param_groups[0]["lr"],
                    run=0,
                    params={n: v.detach().clone() for n, v in state.items()},
                    buffers={},
                    adam=AdamState(step, moments["exp_avg"], moments["exp_avg_sq"], 0.9, 0.98, 1e-3),
                )
            )
    return found


def cast(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint in another dtype."""

    def tree(values: Tree) -> Tree:
        return {name: value.to(dtype) for name, value in values.items()}

    adam = checkpoint.adam
    if adam is not None:
        adam = replace(adam, exp_avg=tree(adam.exp_avg), exp_avg_sq=tree(adam.exp_avg_sq))
    return replace(checkpoint, params=tree(checkpoint.params), adam=adam)
