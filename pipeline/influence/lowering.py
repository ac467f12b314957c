"""What stays float32 in a pass in lower precision, beyond what torch keeps: it costs little and saves the ranking.

In bfloat16 these are the sum that runs through the layers of a transformer, from the embedding of the patches on, and
the products with one row per pair, such as the projection to the features (measured in docs/performance.md); in tf32
these products, and the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.influence.arithmetic import arithmetic

Rule = Callable[..., Any]


#: Products whose first argument is a table of rows.
_PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Rules(TorchFunctionMode):
    """Within this context rules take the place of torch's functions; under autocast those of this module do, too.

    Args:
        rules: by function; one that gives `NotImplemented` leaves the call to torch.
    """

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        super().__init__()
        self._rules: dict[Any, Rule] = {functional.conv2d: self._patches, functional.batch_norm: batch_norm, **rules}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PRODUCTS or not _has_one_row_per_pair(*args):
            return self._called(func, args, kwargs or {})
        whole: AbstractContextManager[Any] = nullcontext()
        if lowered_to(args[0]) is not None:
            args = [None if each is None else each.float() for each in args]
            whole = torch.autocast(args[0].device.type, enabled=False)
        with arithmetic("fp32"), whole:
            return self._called(func, args, kwargs or {})

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer."""
        return functional.linear(input, weight, bias)

    def _patches(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        """A convolution over patches that do not overlap begins a stream of tokens: what it gives is not lowered.

        It is one product of matrices, and its tangent along the weights another: torch's derivative multiplies zeros
        for that of the pixels, too, and on a GPU its convolution of large patches takes a tenth of a pass
        (docs/performance.md).
        """
        sides = tuple(weight.shape[2:])
        steps = (stride,) * len(sides) if isinstance(stride, int) else tuple(stride)
        if steps != sides or padding not in (0, (0, 0), "valid") or max(sides) == 1:
            return NotImplemented
        lower = lowered_to(input)
        if groups != 1 or dilation not in (1, (1, 1)):
            if lower is None:
                return NotImplemented
            return torch.conv2d(input, weight, bias, stride, padding, dilation, groups).float()
        tokens = self._product(_patch_values(input, *sides), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return tokens if lower is None else tokens.float()

    def _called(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        rule = self._rules.get(func)
        found = NotImplemented if rule is None else rule(*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def lowered_to(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast lowers products of tensors on this device; None where it is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _has_one_row_per_pair(*args: Any) -> bool:
    """Whether a product of matrices is cheap: its rows are no tokens or pixels, only pairs."""
    return len(args) > 1 and all(isinstance(each, Tensor) and each.dim() == 2 for each in args[:2])


def _patch_values(images: Tensor, height: int, width: int) -> Tensor:
    """Patches of images `[n, c, h, w]`, as `[n, rows, columns, c * height * width]`; the rest at the edges is left."""
    rows, columns = images.shape[2] // height, images.shape[3] // width
    inside = images[:, :, : rows * height, : columns * width]
    split = inside.reshape(*images.shape[:2], rows, height, columns, width)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3)


def batch_norm(
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """In evaluation a scale and a shift per channel; torch's own tangent is float32, which convolutions refuse."""
    if training or mean is None or variance is None or lowered_to(input) is None:
        return NotImplemented
    scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (input.dim() - 2))
    return input * scale.to(input.dtype).view(shape) + shift.to(input.dtype).view(shape)
