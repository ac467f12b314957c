"""Layers: one value per row of every shard, worked out by one pass for the next, as `.npy` in a scratch folder."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.selection.parsing import read_npy_header
from pipeline.store import storage


def url(scratch: str, name: str, part: int) -> str:
    """Where part number `part` (usually a shard) of layer `name` lies."""
    return storage.join(scratch, name, f"{part:05d}.npy")


def write(scratch: str, name: str, part: int, values: npt.NDArray[Any]) -> None:
    """Write a part of a layer atomically."""
    with storage.atomic_writer(url(scratch, name, part)) as handle:
        np.lib.format.write_array(handle, values, allow_pickle=False)


def read(scratch: str, name: str, part: int) -> npt.NDArray[Any]:
    """A whole part of a layer."""
    with storage.open_read(url(scratch, name, part)) as handle:
        shape, fortran, dtype = read_npy_header(handle)
        return np.frombuffer(handle.read(), dtype=dtype).reshape(shape, order="F" if fortran else "C")


def read_rows(scratch: str, name: str, part: int, start: int, stop: int) -> npt.NDArray[Any]:
    """Rows `start` to `stop` of a one-dimensional part, without reading the others."""
    with storage.open_read(url(scratch, name, part)) as handle:
        _, _, dtype = read_npy_header(handle)
        handle.seek(start * dtype.itemsize, io.SEEK_CUR)
        return np.frombuffer(handle.read((stop - start) * dtype.itemsize), dtype=dtype)


def remove_all(scratch: str) -> None:
    """Remove the scratch folder and everything in it, and the folder it lies in when that is empty."""
    if storage.exists(scratch):
        storage.remove_folder(scratch)
        fs, path = storage.filesystem(scratch)
        with suppress(OSError):
            fs.rmdir(os.path.dirname(path))
