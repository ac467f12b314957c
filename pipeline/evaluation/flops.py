"""Counting floating-point operations, those of the dense products that the passes call by name included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """A context that counts; torch's own counter does not know oneDNN's products and those added in place."""
    known: dict[Any, Any] = {torch.ops.aten.addmm_: _added}
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        known[torch.ops.mkldnn._linear_pointwise] = _linear
    return FlopCounterMode(display=False, custom_mapping=known)


def _linear(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of `x W^T`: shapes `[..., k]` and `[..., n]`."""
    return 2 * int(math.prod(out_shape)) * int(x[-1])


def _added(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Of a product added to a tensor."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])
