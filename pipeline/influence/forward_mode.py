"""Typed faces of `torch.func.jvp` and `vjp` and of dual tensors, whose own annotations do not say what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.func
from torch import Tensor
from torch.autograd import forward_ad


def push_forward(function: Callable[..., Any], at: tuple[Any, ...], along: tuple[Any, ...]) -> tuple[Any, Any]:
    """Value of the function and its derivative along the tangents."""
    result: Any = torch.func.jvp(function, at, along)
    return result[0], result[1]


def push_named_forward(
    function: Callable[[dict[str, Tensor]], Iterable[Tensor]], at: dict[str, Tensor], along: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that a function of named ones gives, and their derivatives along tangents of the same names.

    What `push_forward` gives, at less cost per operator: dual tensors without the layers that let derivatives nest.
    Not within another derivative or `vmap`.
    """
    with forward_ad.dual_level():
        found = [parted(part) for part in function({name: carrying(at[name], along[name]) for name in at})]
    return [v for v, _ in found], [torch.zeros_like(v) if tangent is None else tangent for v, tangent in found]


def pull_back(function: Callable[..., Any], at: Any, cotangent: Any) -> Any:
    """The cotangent of the function's value carried back to its one argument."""
    result: Any = torch.func.vjp(function, at)
    return result[1](cotangent)[0]


def parted(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of a tensor inside of a function that is pushed forward; None where no tangent flows."""
    found: Any = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return found.primal, found.tangent


def carrying(value: Tensor, tangent: Tensor) -> Tensor:
    """The value with this tangent, the inverse of `parted`."""
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual
