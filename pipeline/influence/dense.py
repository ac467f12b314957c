"""Dense layers of passes without gradients: on a CPU in float32 through oneDNN.

torch's own linear layers leave float32 on a CPU to MKL, which on processors of other makers than its own takes twice
the time of oneDNN (measured in docs/performance.md). oneDNN also adds a product to a tensor as it writes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`."""
    if _by_onednn(x, weight):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return functional.linear(x, weight, bias)


def linear_added(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`total + x W^T`; `total` `[..., n]` is contiguous and may be written over."""
    if _by_onednn(x, weight):
        added: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, total, weight, None, "add")
        return added
    total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return total


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()  # the operator has no backward
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
