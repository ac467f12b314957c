"""Layer norm for second forward derivatives, where torch's own gives wrong numbers without an error.

The forward derivative of `native_layer_norm` uses the row's mean and deviation as constants, so a tangent pass through
a tangent pass misses how they move (seen with torch 2.13). Written with elementary operators it is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.influence.lowering import Rules


class TwiceDifferentiable(Rules):
    """Within this context `layer_norm` has a right second forward derivative."""

    def __init__(self) -> None:
        super().__init__({functional.layer_norm: _layer_norm, torch.layer_norm: _layer_norm})


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
