"""The processes that share each training batch: what they exchange, with torch.distributed, or nothing when alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.types import Features


class Workers(Protocol):
    """The group a training process belongs to."""

    rank: int
    size: int

    def gather(self, features: Features, captions: Tensor) -> tuple[Features, Tensor]:
        """Features and captions of the whole batch, differentiable in this worker's own part."""

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the workers."""

    def agree(self, number: int) -> int:
        """The first worker's number."""


class Alone:
    """One process that has the whole batch."""

    rank = 0
    size = 1

    def gather(self, features: Features, captions: Tensor) -> tuple[Features, Tensor]:
        """What it was given."""
        return features, captions

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing to add."""

    def agree(self, number: int) -> int:
        """Its own number."""
        return number


class Group:
    """The workers of torch's default process group, each with an equal part of the batch in the order of ranks.

    Every worker computes the loss of the whole batch with the others' features as constants. The gradient through its
    own features is then exact, and the sum over workers is the gradient of the one loss. The scale and bias enter
    every worker's loss in full, so only the first worker differentiates them.

    Args:
        device: this worker's own; with NCCL a GPU that no other worker has.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather(self, features: Features, captions: Tensor) -> tuple[Features, Tensor]:
        """Features and captions of the whole batch, by rank."""
        scale, bias = features.scale, features.bias
        if self.rank:
            scale, bias = scale.detach(), bias.detach()
        everyone = Features(self._joined(features.image), self._joined(features.text), scale, bias)
        return everyone, self._joined(captions)

    def _joined(self, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.detach().contiguous())
        parts[self.rank] = own
        return torch.cat(parts)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """One all-reduce of all gradients laid end to end: the same sums, bit by bit, in every run on these workers."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def agree(self, number: int) -> int:
        """The first worker's number."""
        shared = torch.tensor([number], device=self._device)
        dist.broadcast(shared, src=0)
        return int(shared)
