"""What stays float32 in a pass in bfloat16, beyond what `torch.autocast` keeps; it costs little and saves the ranking.

That is the sum that runs through the layers of a transformer, which starts with the embedding of the patches, and the
products with one row per pair, such as the projection to the features (measured in docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Rule = Callable[..., Any]


class Rules(TorchFunctionMode):
    """Within this context functions of torch are replaced by rules, and by those of this module under autocast.

    Args:
        rules: by function; one that gives `NotImplemented` leaves the call to torch.
    """

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        super().__init__()
        matmul = dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _projection)
        self._rules: dict[Any, Rule] = {functional.conv2d: _patches, functional.linear: _head, **matmul, **rules}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = self._rules.get(func)
        found = NotImplemented if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


def lowered_to(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast lowers products of tensors on this device; None where it is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_one_row_per_pair(tensor: Tensor) -> bool:
    """Whether a product of these rows is cheap: no tokens or pixels, only pairs."""
    return tensor.dim() == 2


def _patches(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    *rest: Any,
    **more: Any,
) -> Any:
    """A convolution over patches that do not overlap begins a stream of tokens: it is lowered, what it gives is not."""
    sides = tuple(weight.shape[2:])
    apart = stride in (sides, sides[0]) and padding in (0, (0, 0), "valid") and max(sides) > 1
    if not apart or lowered_to(input) is None:
        return NotImplemented
    return torch.conv2d(input, weight, bias, stride, padding, *rest, **more).float()


def _projection(left: Tensor, right: Tensor) -> Any:
    if not (isinstance(right, Tensor) and right.dim() == 2 and is_one_row_per_pair(left)) or lowered_to(left) is None:
        return NotImplemented
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float()


def _head(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not is_one_row_per_pair(input) or lowered_to(input) is None:
        return NotImplemented
    with torch.autocast(input.device.type, enabled=False):
        return functional.linear(input.float(), weight.float(), None if bias is None else bias.float())
