"""Operators with their tangents in one kernel on a GPU: attention, layer norm and gelu, where Triton is there.

Attention writes no table of weights and copies no part of a projection. Each kernel is tried on a small example of its
kind before it is used; where it cannot be built or is wrong, the rules of `tangents` do without it, and say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn import functional

from pipeline.errors import NoteWarning
from pipeline.influence.dense import traced
from pipeline.influence.memory import lacks_memory

try:
    from pipeline.influence import kernels
except ImportError:  # torch's builds for CPUs come without Triton
    kernels = None  # type: ignore[assignment]

#: Values of a head, or of a row of a norm, that fit into a kernel's registers.
_WIDEST_HEAD, _WIDEST_ROW = 128, 8192

#: Values of gelu in a block.
_BLOCK = 1024

#: Error, relative to the largest value, above which a kernel is not used, by bytes of a value; attention's products of
#: float32 values are in tf32. Rounding to bfloat16 is 4e-3 of a value.
_TOLERANCE = {2: 2e-2, 4: 1e-2}

#: Below this compute capability tensor cores multiply neither bfloat16 nor tf32.
_CAPABILITY = (8, 0)


def takes_attention(tensors: list[Tensor], mask: Tensor | None) -> bool:
    """Whether the kernel computes attention of these queries, keys, values and their tangents.

    On a GPU, of tensors `[pairs, heads, tokens, d]` of equal shapes, in 16 bits or where torch may use tf32, and with a
    mask `[tokens, tokens]` at most.
    """
    first = tensors[0]
    return (
        _fit(tensors)
        and first.dim() == 4
        and first.shape[-1] <= _WIDEST_HEAD
        and (first.itemsize == 2 or (first.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32))
        and (mask is None or (mask.shape == (first.shape[2], first.shape[2]) and mask.stride(1) == 1))
        and _works(attention_with_tangent, first.device, first.dtype, first.shape[-1])
    )


def takes_norm(x: list[Tensor], parameters: list[Tensor]) -> bool:
    """Whether the kernel computes the layer norm of `x` and its tangent over the last dimension.

    On a GPU, in float32, along all of weight and bias; not in a compiled pass, which fuses more than this.
    """
    return (
        _fit(x)
        and _fit(parameters)
        and x[0].dtype == parameters[0].dtype == torch.float32
        and x[0].shape[-1:] == parameters[0].shape
        and x[0].shape[-1] <= _WIDEST_ROW
        and not traced()
        and _works(norm_with_tangent, x[0].device, torch.float32, x[0].shape[-1])
    )


def takes_gelu(x: list[Tensor]) -> bool:
    """Whether the kernel computes gelu and its tangent: on a GPU in float32 or 16 bits, not in a compiled pass."""
    return (
        _fit(x)
        and x[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not traced()
        and _works(gelu_with_tangent, x[0].device, x[0].dtype, 1)
    )


def _fit(tensors: list[Tensor]) -> bool:
    """Whether these are tensors on a GPU of one shape and dtype, and there are kernels at all."""
    first = tensors[0]
    same = all(each.shape == first.shape and each.dtype == first.dtype for each in tensors)
    return kernels is not None and first.is_cuda and same


def attention_with_tangent(tensors: list[Tensor], mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention `[pairs, heads, tokens, d]` and its tangent, of queries, keys, values and their tangents.

    Products of float32 tensors are in tf32. What comes back lies in memory as `[pairs, tokens, heads, d]`.
    """
    run: Any = _opaque_attention if traced() else _attention
    value, tangent = run(*tensors, mask, scale)
    return value, tangent


def norm_with_tangent(x: list[Tensor], parameters: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Layer norm over the last dimension and its tangent.

    Args:
        x: values and tangents `[..., width]`.
        parameters: weight, bias and their tangents `[width]`.
        eps: added to the variance.
    """
    value, tangent = (part.contiguous() for part in x)
    out, dout = torch.empty_like(value), torch.empty_like(value)
    width = value.shape[-1]
    with torch.cuda.device_of(value):  # type: ignore[no-untyped-call]
        kernels.norm_with_tangent[(value.numel() // width,)](
            value,
            tangent,
            *(part.contiguous() for part in parameters),
            out,
            dout,
            width,
            eps,
            PADDED=_power_of_two(width),
            num_warps=4 if width <= 2048 else 8,
        )
    return out, dout


def gelu_with_tangent(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gelu, by the error function, of values `[...]`, and its tangent."""
    value, tangent = (part.contiguous() for part in x)
    out, dout = torch.empty_like(value), torch.empty_like(value)
    with torch.cuda.device_of(value):  # type: ignore[no-untyped-call]
        grid = (-(-value.numel() // _BLOCK),)
        kernels.gelu_with_tangent[grid](value, tangent, out, dout, value.numel(), BLOCK=_BLOCK)
    return out, dout


def _attention(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    given = [q, k, v, dq, dk, dv]
    if q.stride(-1) != 1 or any(each.stride() != q.stride() for each in given):
        given = [each.contiguous() for each in given]
    pairs, heads, tokens, width = q.shape
    out, dout = _empty(q), _empty(q)
    rows, columns, warps, stages = _blocks(q.itemsize, width)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        kernels.attention_with_tangent[(pairs * heads, -(-tokens // rows))](
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
            PADDED=max(16, _power_of_two(width)),
            MASKED=mask is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
            num_stages=stages,
        )
    return out, dout


def _blocks(itemsize: int, width: int) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps, and blocks of keys that are loaded at a time: as fit into the registers."""
    return (64, 32, 4, 2) if itemsize == 2 and width <= 64 else (32, 32, 4, 1)


def _empty(like: Tensor) -> Tensor:
    """A tensor of this shape, its heads side by side in memory."""
    pairs, heads, tokens, width = like.shape
    return like.new_empty(pairs, tokens, heads, width).transpose(1, 2)


def _power_of_two(number: int) -> int:
    """The first that is not less."""
    return 1 << (number - 1).bit_length()


_opaque_attention = torch.library.custom_op("diffprune::attention", _attention, mutates_args=())
_opaque_attention.register_fake(lambda q, *rest: (_empty(q), _empty(q)))


@cache
def _works(function: Callable[..., Any], device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel can be built for this GPU and agrees with the formula in float64.

    Where memory is short it raises that error, and the answer is not known yet.
    """
    with disable_proxy_modes_tracing():
        generator = torch.Generator().manual_seed(0)
        try:
            found, expected = _EXAMPLES[function](generator, device, dtype, width)
            found = [value.cpu().double() for value in found]
        except Exception as problem:  # a missing compiler, an unknown GPU
            if lacks_memory(problem):
                raise
            text = " ".join(str(problem).split())
            return _refused(function, f"{type(problem).__name__}: {text[:200]}")
        both = zip(found, expected, strict=True)
        error = max(float((one - other).abs().max() / other.abs().max()) for one, other in both)
    return error < _TOLERANCE[dtype.itemsize] or _refused(function, f"its results are off by {error:.1g}")


def _refused(function: Callable[..., Any], reason: str) -> bool:
    name = function.__name__.split("_")[0]
    warnings.warn(
        f"{name} and its tangent run without their own kernel, and slower: {reason}", NoteWarning, stacklevel=2
    )
    return False


#: What a kernel gave, on its device, and what it should have given, float64 on the CPU.
_Results = tuple[Sequence[Tensor], Sequence[Tensor]]


def _attention_example(generator: torch.Generator, device: torch.device, dtype: torch.dtype, width: int) -> _Results:
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        raise RuntimeError(f"expected compute capability 8.0 or more, found {'.'.join(map(str, capability))}")
    drawn = torch.randn(6, 1, 2, 77, width, generator=generator).to(dtype)
    q, k, v, dq, dk, dv = drawn.double()
    given, causal = list(drawn.to(device)), torch.full((77, 77), -torch.inf).triu(1)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for mask in (None, causal):
        logits = width**-0.5 * q @ k.mT
        weights = (logits if mask is None else logits + mask).softmax(-1)
        moved = width**-0.5 * (dq @ k.mT + q @ dk.mT)
        bent = weights * (moved - (weights * moved).sum(-1, keepdim=True))
        expected += weights @ v, bent @ v + weights @ dv
        found += attention_with_tangent(given, None if mask is None else mask.to(device, dtype), width**-0.5)
    return found, expected


def _norm_example(generator: torch.Generator, device: torch.device, dtype: torch.dtype, width: int) -> _Results:
    given = torch.randn(2, 5, width, generator=generator).to(dtype)
    parameters = torch.randn(4, width, generator=generator).to(dtype)
    weight, bias, dweight, dbias = parameters.double()
    x, dx = given.double() - given.double().mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    dnormal = scale * (dx - scale.square() * x * (x * dx).mean(-1, keepdim=True))
    expected = scale * x * weight + bias, dnormal * weight + scale * x * dweight + dbias
    return norm_with_tangent(list(given.to(device)), list(parameters.to(device)), 1e-5), expected


def _gelu_example(generator: torch.Generator, device: torch.device, dtype: torch.dtype, width: int) -> _Results:
    given = torch.randn(2, 3000, generator=generator).to(dtype)
    x, dx = given.double()
    slope = torch.special.ndtr(x) + x * torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    return gelu_with_tangent(list(given.to(device))), (functional.gelu(x), slope * dx)


_EXAMPLES: dict[Callable[..., Any], Callable[..., _Results]] = {
    attention_with_tangent: _attention_example,
    norm_with_tangent: _norm_example,
    gelu_with_tangent: _gelu_example,
}
