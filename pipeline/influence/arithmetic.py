"""In which precision products are computed, and how they are added up: settings of torch, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline.types import Features


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Within this context float32 is float32, or tf32 where `precision` is `tf32`; no effect on a CPU.

    Of itself torch computes convolutions in tf32 and products of matrices in float32, and may add up the parts of a
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
    """Within this context attention modules call their products one by one in evaluation, too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def features_in(precision: str, device: torch.device, run: Callable[[], Features]) -> Features:
    """Features that a model gives, by products in this precision; themselves, and what follows, float32 or wider."""
    with arithmetic(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        found = run()
    return Features(*(value.float() if value.itemsize < 4 else value for value in found))
