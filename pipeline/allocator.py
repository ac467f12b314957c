"""The C library's allocator in processes that compute on a CPU: what one pass frees, the next one takes again."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

#: Bytes: tensors up to the first (glibc's own limit) come from the heap, whose free end is kept up to the second.
_LARGEST, _KEPT = 32 << 20, (1 << 31) - 1


def keep_freed_memory() -> None:
    """Keep the memory of large tensors in this process once it is free, instead of returning it to the system.

    The system gives memory back zeroed, page by page, at each first touch: that took up to a fifth of a pass
    (docs/performance.md). Without effect where the C library is not glibc.
    """
    with suppress(OSError, AttributeError, TypeError):  # no such library or function there
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
