"""Norms for second forward derivatives, where torch's own give wrong numbers or break off.

The forward derivative of `native_layer_norm` uses the row's mean and deviation as constants, so a tangent pass through
a tangent pass misses how they move, without an error. That of batch norm is float32 where the value is bfloat16, which
the next convolution refuses. (Seen with torch 2.13.) Written with elementary operators both are right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.influence.lowering import Rules


class TwiceDifferentiable(Rules):
    """Within this context `layer_norm`, and `batch_norm` in evaluation, have right second forward derivatives."""

    def __init__(self) -> None:
        super().__init__(
            {functional.layer_norm: _layer_norm, torch.layer_norm: _layer_norm, functional.batch_norm: _batch_norm}
        )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def _batch_norm(
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        return functional.batch_norm(input, mean, variance, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (input.dim() - 2))
    return input * scale.to(input.dtype).view(shape) + shift.to(input.dtype).view(shape)
