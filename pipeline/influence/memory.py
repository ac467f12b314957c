"""When a GPU's memory runs out: how to tell, and work that is then done in smaller parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Found = TypeVar("_Found")

#: What the driver and Triton say, cuBLAS and its like (`CUBLAS_STATUS_ALLOC_FAILED`), and cuDNN.
_WORDS = ("out of memory", "ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, whichever library raised it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def halving(work: Callable[[int], _Found], size: int) -> _Found:
    """What `work` gives with parts of `size` pairs; where memory does not hold them, of half as many, and so on."""
    while True:
        try:
            return work(size)
        except RuntimeError as error:
            if size == 1 or not lacks_memory(error):
                raise
        # Out of the handler, whose traceback held the tensors of the pass.
        torch.cuda.empty_cache()
        size = (size + 1) // 2
