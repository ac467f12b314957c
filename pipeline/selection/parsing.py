"""Python's parser, called by several threads: one at a time, as CPython 3.11 builds only one syntax tree at a time.

Two at once now and then end in `SystemError: AST constructor recursion depth mismatch`.
"""

from __future__ import annotations

import ast
from threading import RLock
from typing import IO, Any

import numpy as np

_one_at_a_time = RLock()


def parse(expression: str) -> ast.expr:
    """The syntax tree of an expression. Raises what `ast.parse` does."""
    with _one_at_a_time:
        return ast.parse(expression, mode="eval").body


def read_npy_header(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype, which a `.npy` file has before its data as a Python literal."""
    version = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with _one_at_a_time:
        shape, fortran, dtype = read(handle)
    return shape, fortran, dtype
