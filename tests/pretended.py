"""A device that is none, for tests of where tensors are: a GPU's rules without a GPU.

Its tensors say that they are on `DEVICE` and keep their values on the CPU. Operations on them are computed there, so
that numbers and the ways that depend on them are right; one that mixes them with tensors of the CPU raises, as with
CUDA. What only a GPU can tell is not seen: its kernels, its arithmetic, its streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: Of the devices that a CPU build knows the one that never holds anything.
DEVICE = torch.device("meta")

#: Operators that take tensors of the CPU beside those of a GPU.
_BETWEEN = ("aten::copy_", "aten::index", "aten::index_put_", "aten::index_put", "aten::masked_fill")


class Pretended(Tensor):
    """A tensor that says it is on `DEVICE`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Machine(TorchDispatchMode):
    """Sees operators that have no tensor of the device among their arguments: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


@contextmanager
def machine() -> Iterator[torch.device]:
    """A machine that has the device."""
    changes: dict[str, Any] = {
        "autocast": lambda *_, **__: nullcontext(),
        "is_autocast_enabled": lambda *_: False,
        # torch's own does not ask the mode before it makes a tensor.
        "tensor": lambda data, *, device="cpu", **options: made(data, **options).to(device),
    }
    made = torch.tensor
    with _Machine(), mock.patch.multiple(torch, **changes):
        yield DEVICE


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    wanted = kwargs.get("device")
    there = bool(here) if wanted is None else torch.device(wanted) == DEVICE
    if here:
        _check(func, args, [tensor for tensor in tensors if not isinstance(tensor, Pretended)])
    if there and not here and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor on {DEVICE}")
    if func is torch.ops.aten._efficientzerotensor.default:
        func = torch.ops.aten.zeros.default  # zeros without memory would need a key of their own
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Pretended) else leaf, (args, kwargs))
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    if there and func is torch.ops.aten.copy_.default:
        there = any(args[0] is tensor.held for tensor in here)
    known = {id(tensor.held): tensor for tensor in here}

    def placed(leaf: Any) -> Any:
        if not there or not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Pretended(leaf)

    return tree_map(placed, func(*args, **kwargs))


def _check(func: Any, args: Any, others: list[Tensor]) -> None:
    """Raise where CUDA would: a number of the CPU may join elementwise operators, little else may."""
    name = func._schema.name
    numbers = torch.Tag.pointwise in func.tags and not any(tensor.dim() for tensor in others)
    moved = name in _BETWEEN and (name == "aten::copy_" or isinstance(args[0], Pretended))
    if others and not numbers and not moved:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in others)
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU: those of the CPU have the shapes {shapes}")
