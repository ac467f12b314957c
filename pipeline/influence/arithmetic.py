"""In which precision products are computed, and how they are added up: settings of torch, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.types import Features


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Within this context float32 is float32, or tf32 where `precision` is `tf32`; no effect on a CPU.

    By default torch computes convolutions in tf32 and matrix products in float32, and may add up the parts of a
    bfloat16 product in bfloat16.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Within this context attention modules call their products one by one, in evaluation mode, too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def features_in(precision: str, device: torch.device, run: Callable[[], Features]) -> Features:
    """Features of a model whose products run in this precision; the features themselves are float32 or wider."""
    with arithmetic(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        found = run()
    return Features(*(value.float() if value.itemsize < 4 else value for value in found))


def _product(start: Tensor | None, left: Tensor, right: Tensor, beta: float, alpha: float, precision: str) -> Tensor:
    """`beta start + alpha left right` of matrices or batches of them; without `start` `left right`."""
    with arithmetic(precision):
        if start is None:
            return left @ right
        add = torch.addmm if left.dim() == 2 else torch.baddbmm
        return add(start, left, right, beta=beta, alpha=alpha)


_opaque_product = torch.library.custom_op("diffprune::product", _product, mutates_args=())
_opaque_product.register_fake(lambda start, left, right, *rest: left.new_empty((*left.shape[:-1], right.shape[-1])))

_PLAIN = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
_ADDED = (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default)
_ADDED_IN_PLACE = (torch.ops.aten.addmm_.default, torch.ops.aten.baddbmm_.default)


class PrecisionRecorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, products in another precision than at its beginning are recorded with that precision.

    A traced program holds none of torch's settings: it runs all its products with the settings in force when it is
    called, except those products that carry their own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._around = torch.backends.cuda.matmul.allow_tf32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        here = torch.backends.cuda.matmul.allow_tf32
        if here == self._around or func not in (*_PLAIN, *_ADDED, *_ADDED_IN_PLACE):
            return func(*args, **kwargs)
        start, left, right = (None, *args) if func in _PLAIN else args
        beta, alpha = (float(kwargs.get(name, 1)) for name in ("beta", "alpha"))
        found: Tensor = _opaque_product(start, left, right, beta, alpha, "tf32" if here else "fp32")
        return start.copy_(found) if func in _ADDED_IN_PLACE else found
