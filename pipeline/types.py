"""The few types that the parts of the pipeline hand to each other: batches of pairs, embeddings, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Named tensors of a model: parameters, buffers, or a vector in parameter space.
Tree = dict[str, Tensor]


@dataclass(slots=True)
class PairBatch:
    """Decoded image-text pairs.

    Attributes:
        images: uint8 `[n, 3, height, width]`, resized and cropped, not yet normalised (the model does that).
        tokens: int64 `[n, context_length]`.
        ids: int64 `[n]`, a hash of each pair's uid: equal ids are the same pair.
        captions: int64 `[n]`, a hash of each caption's text: equal values are equal captions.
    """

    images: Tensor
    tokens: Tensor
    ids: Tensor
    captions: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> PairBatch:
        return PairBatch(self.images[rows], self.tokens[rows], self.ids[rows], self.captions[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same pairs on another device."""
        moved = (getattr(self, name).to(device, non_blocking=non_blocking) for name in self.__slots__)
        return PairBatch(*moved)

    def pinned(self) -> PairBatch:
        """The same pairs in page-locked memory, from which a GPU copies by itself."""
        return PairBatch(*(getattr(self, name).pin_memory() for name in self.__slots__))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of pairs on a GPU from being used again before `stream` is done with them."""
        for name in self.__slots__:
            getattr(self, name).record_stream(stream)

    @staticmethod
    def cat(batches: list[PairBatch]) -> PairBatch:
        """Join batches in order."""
        return PairBatch(*(torch.cat([getattr(b, name) for b in batches]) for name in PairBatch.__slots__))


def longest_caption(tokens: Tensor) -> int:
    """Tokens `[n, context_length]` up to the end of the longest caption; 1 where there are no captions."""
    return int(tokens.ne(0).any(0).nonzero().max()) + 1 if len(tokens) else 1


class Features(NamedTuple):
    """What a two-tower model says of a batch.

    Attributes:
        image: `[n, d]`, rows of unit length.
        text: `[n, d]`, rows of unit length.
        scale: scalar, the factor on cosine similarities (`exp(logit_scale)`).
        bias: scalar added to the logits (0 for models without one).
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(slots=True)
class AdamState:
    """AdamW's state after `steps` steps, as `torch.optim.AdamW` keeps it (not bias-corrected)."""

    steps: int
    exp_avg: Tree
    exp_avg_sq: Tree
    beta1: float
    beta2: float
    eps: float


@dataclass(slots=True)
class Checkpoint:
    """A model after `step` optimizer steps.

    Attributes:
        step: steps taken so far, `t` in Eq. 9.
        lr: the learning rate that the last of them used, `eta_t`.
        run: which proxy run it belongs to, from 0.
        params: trainable tensors by name.
        buffers: the other tensors of the model (batch-norm statistics and the like).
        adam: AdamW's state, where known.
        momentum: SGD's momentum buffers, where known.
        gain: length of a step along a steady gradient, in learning rates: `1 / (1 - beta)` for SGD with settled
            momentum `beta`, whose buffers are sums; 1 for SGD without momentum and for AdamW; None where a file has
            momentum buffers and does not say with which `beta`.
    """

    step: int
    lr: float
    run: int
    params: Tree
    buffers: Tree
    adam: AdamState | None = None
    momentum: Tree | None = None
    gain: float | None = 1.0
