"""Typed faces of `torch.func.jvp` and `vjp`, whose own annotations do not say what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.func


def push_forward(function: Callable[..., Any], at: tuple[Any, ...], along: tuple[Any, ...]) -> tuple[Any, Any]:
    """Value of the function and its derivative along the tangents."""
    result: Any = torch.func.jvp(function, at, along)
    return result[0], result[1]


def pull_back(function: Callable[..., Any], at: Any, cotangent: Any) -> Any:
    """The cotangent of the function's value carried back to its one argument."""
    result: Any = torch.func.vjp(function, at)
    return result[1](cotangent)[0]
