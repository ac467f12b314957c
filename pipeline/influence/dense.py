"""Dense layers of passes without gradients: on a CPU in float32 through oneDNN.

On a CPU torch's own linear layers leave float32 to Intel's MKL, which takes twice as long as oneDNN on processors of
other makers (measured in docs/performance.md). oneDNN can also add a product to a tensor as it writes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`, `[..., n]`.

    Args:
        x: rows `[..., d]`.
        weight: `W`, `[n, d]`.
        bias: `b`, `[n]`.
    """
    if not _by_onednn(x, weight):
        return functional.linear(x, weight, bias)
    product: Tensor = (_opaque_linear if traced() else _linear)(x, weight, bias)
    return product


def linear_added(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`total + x W^T`, `[..., n]`.

    Args:
        total: `[..., n]`, contiguous; may be written over.
        x: rows `[..., d]`.
        weight: `W`, `[n, d]`.
    """
    if _by_onednn(x, weight):
        added: Tensor = (_opaque_linear_added if traced() else _linear_added)(total, x, weight)
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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _linear_added(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    added: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, total, weight, None, "add")
    return added


# TorchInductor knows oneDNN's products only with weights that do not change; these it takes as they are.
_opaque_linear = torch.library.custom_op(
    "diffprune::linear", _linear, mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
_opaque_linear.register_fake(lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])))
_opaque_linear_added = torch.library.custom_op(
    "diffprune::linear_added",
    _linear_added,
    mutates_args=(),
    schema="(Tensor total, Tensor x, Tensor weight) -> Tensor",
)
_opaque_linear_added.register_fake(lambda total, x, weight: torch.empty_like(total))


def traced() -> bool:
    """Whether operators are recorded for a compiled program."""
    return get_proxy_mode() is not None
