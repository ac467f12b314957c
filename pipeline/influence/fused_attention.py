"""Attention and its tangent in one kernel on a GPU: no table of weights is written, no part of a projection copied."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

try:
    from pipeline.influence.attention_kernel import attention_with_tangent as _kernel
except ImportError:  # torch's builds for CPUs come without Triton
    _kernel = None

#: Values per head that fit into the kernel's registers.
_WIDEST_HEAD = 128

#: Error, relative to the largest value, above which the kernel is not used; rounding to bfloat16 is 4e-3 of a value.
_TOLERANCE = 2e-2


def takes(tensors: list[Tensor], mask: Tensor | None) -> bool:
    """Whether the kernel computes attention of these queries, keys, values and their tangents.

    On a GPU, of tensors `[pairs, heads, tokens, d]` of equal shapes, in 16 bits or where torch may use tf32, and with a
    mask `[tokens, tokens]` at most; if it gives the right result there, which is tried once.
    """
    first = tensors[0]
    return (
        _kernel is not None
        and first.is_cuda
        and first.dim() == 4
        and first.shape[-1] <= _WIDEST_HEAD
        and (first.itemsize == 2 or (first.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32))
        and all(each.shape == first.shape and each.dtype == first.dtype for each in tensors)
        and (mask is None or (mask.shape == (first.shape[2], first.shape[2]) and mask.stride(1) == 1))
        and _works(first.device, first.dtype, first.shape[-1])
    )


@cache
def _works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel can be built for this GPU and agrees with attention in single products in float64."""
    with disable_proxy_modes_tracing():
        drawn = torch.randn(6, 1, 2, 77, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        try:
            found = _run(*_six(drawn), None, width**-0.5)
        except Exception as problem:  # a missing compiler, an unknown GPU
            return _refused(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
        expected = _in_single_products(*_six(drawn.double()), width**-0.5)
        both = zip(found, expected, strict=True)
        error = max(float((one - other).abs().max() / other.abs().max()) for one, other in both)
    return error < _TOLERANCE or _refused(f"its results are off by {error:.1g}")


def _six(stacked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, dq, dk, dv = stacked
    return q, k, v, dq, dk, dv


def _refused(reason: str) -> bool:
    warnings.warn(f"attention with tangents runs without its own kernel, several times as slow: {reason}", stacklevel=2)
    return False


def _in_single_products(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    weights = (scale * q @ k.mT).softmax(-1)
    ds = scale * (dq @ k.mT + q @ dk.mT)
    bent = weights * (ds - (weights * ds).sum(-1, keepdim=True))
    return weights @ v, bent @ v + weights @ dv


def attention_with_tangent(tensors: list[Tensor], mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention `[pairs, heads, tokens, d]` and its tangent, of tensors that the kernel `takes`.

    Products of float32 tensors are in tf32. What comes back lies in memory as `[pairs, tokens, heads, d]`.
    """
    run: Any = _opaque if get_proxy_mode() is not None else _run
    value, tangent = run(*tensors, mask, scale)
    return value, tangent


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    given = [q, k, v, dq, dk, dv]
    if q.stride(-1) != 1 or any(each.stride() != q.stride() for each in given):
        given = [each.contiguous() for each in given]
    pairs, heads, tokens, width = q.shape
    out, dout = _made(q), _made(q)
    padded = max(16, 1 << (width - 1).bit_length())
    rows, columns, warps, stages = _blocks(tokens, q.itemsize)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        _kernel[(pairs * heads, -(-tokens // rows))](
            *given,
            given[0] if mask is None else mask,
            out,
            dout,
            *given[0].stride()[:3],
            *out.stride()[:3],
            0 if mask is None else mask.stride(0),
            tokens,
            scale,
            HEADS=heads,
            WIDTH=width,
            PADDED=padded,
            MASKED=mask is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
            num_stages=stages,
        )
    return out, dout


def _blocks(tokens: int, itemsize: int) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps, and blocks of keys that are loaded at a time."""
    return (64, 64, 4, 1) if itemsize == 2 else (32, 32, 4, 1)


def _made(like: Tensor) -> Tensor:
    """An empty tensor of this shape, its heads side by side in memory."""
    pairs, heads, tokens, width = like.shape
    return like.new_empty(pairs, tokens, heads, width).transpose(1, 2)


_opaque = torch.library.custom_op("diffprune::attention", _run, mutates_args=())
_opaque.register_fake(lambda q, *rest: (_made(q), _made(q)))
