"""Norms for second forward derivatives, where torch's own give wrong numbers without an error.

The forward derivatives of layer, batch and instance norm use mean and deviation as constants, so a tangent pass through
a tangent pass misses how they move (seen with torch 2.13). Written with elementary operators they are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.influence import lowering


class TwiceDifferentiable(lowering.Rules):
    """Within this context norms by the input's own statistics have a right second forward derivative."""

    def __init__(self) -> None:
        super().__init__(
            {
                functional.layer_norm: _layer_norm,
                torch.layer_norm: _layer_norm,
                functional.batch_norm: _batch_norm,
                functional.instance_norm: _instance_norm,
            }
        )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    out = _normalised(input, range(-len(normalized_shape), 0), eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def _batch_norm(
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """By the batch's statistics in evaluation, too, where a convolution standardises its weights or keeps none."""
    if not training:
        return lowering.batch_norm(input, mean, variance, weight, bias, training, momentum, eps)
    out = _normalised(input, [dim for dim in range(input.dim()) if dim != 1], eps)
    return _per_channel(out, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return NotImplemented
    return _per_channel(_normalised(input, range(2, input.dim()), eps), weight, bias)


def _normalised(input: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """Mean 0 and deviation 1 over these dimensions."""
    dims = tuple(dims)
    centred = input - input.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _per_channel(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Weight and bias `[c]` of tensors `[n, c, ...]`."""
    shape = (-1, *[1] * (input.dim() - 2))
    if weight is not None:
        input = input * weight.view(shape)
    return input if bias is None else input + bias.view(shape)
