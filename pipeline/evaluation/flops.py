"""Counting floating-point operations, those of the dense products that the passes call by name included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.influence.arithmetic import attention_in_parts


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """A context that counts, also oneDNN's products, those added in place and the CPU's fused attention.

    What attention modules call in evaluation to be faster cannot be counted, so they do without it in here.
    """
    known: dict[Any, Any] = {
        torch.ops.aten.addmm_: _added,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    }
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        known[torch.ops.mkldnn._linear_pointwise] = _linear
    with attention_in_parts(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        yield counter


def _linear(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of `x W^T`: shapes `[..., k]` and `[..., n]`."""
    return 2 * int(math.prod(out_shape)) * int(x[-1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of both products of attention: shapes `[..., targets, d]`, `[..., sources, d]` and `[..., sources, e]`."""
    return 2 * int(math.prod(query[:-1])) * int(key[-2]) * (int(query[-1]) + int(value[-1]))


def _added(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Of a product added to a tensor."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])
