"""DataComp's subset file: 128-bit uids as a sorted `u8,u8` array, made of any number of uids in bounded memory."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.emit.files import large_file, scratch_folder
from pipeline.errors import InputError
from pipeline.selection.keys import parse_uids
from pipeline.store import storage

#: High and low 64 bits of a uid, as DataComp's resharder asserts it.
UID_DTYPE = np.dtype("u8,u8")
#: Uids that are sorted in memory at a time (16 bytes each, a few copies while sorting).
CHUNK = 4_000_000

Uids = npt.NDArray[np.void]


def pack_uids(uids: pa.Array) -> Uids:
    """Turn an Arrow string array of 32 hex digits each into `UID_DTYPE` `[n]`, in the same order.

    Raises `InputError` that quotes the first value that is not a uid.
    """
    packed = np.empty(len(uids), UID_DTYPE)
    try:
        packed["f0"], packed["f1"] = parse_uids(uids)
    except InputError:
        wrong = next(uid for uid in uids.to_pylist() if uid is None or not re.fullmatch("[0-9a-fA-F]{32}", uid))
        raise InputError(f"expected uids of 32 hex digits, found {wrong!r}") from None
    return packed


def sort_unique(uids: Uids) -> Uids:
    """The distinct uids in lexicographic order of (high, low)."""
    if not len(uids):
        return uids
    pairs = uids.view(np.uint64).reshape(-1, 2)
    high = pairs[:, 0].copy()
    order = np.argsort(high)
    high = high[order]
    low = pairs[order, 1]
    # Distinct pairs nearly always differ in the high half already, so the second key is looked at only where they
    # don't.
    tied = np.flatnonzero(high[1:] == high[:-1])
    if len(tied):
        rows = np.union1d(tied, tied + 1)
        low[rows] = low[rows][np.lexsort((low[rows], high[rows]))]
    new = np.ones(len(high), bool)
    np.not_equal(high[1:], high[:-1], out=new[1:])
    new[1:] |= low[1:] != low[:-1]
    result = np.empty((int(new.sum()), 2), np.uint64)
    result[:, 0], result[:, 1] = high[new], low[new]
    return result.view(UID_DTYPE).reshape(-1)


def read_uids(keep_files: Iterable[str]) -> Iterator[Uids]:
    """The uids of keep lists (Parquet with a `uid` column), a batch at a time, in order."""
    for url in keep_files:
        with storage.open_read(url) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(1 << 18, columns=["uid"]):
                try:
                    yield pack_uids(batch.column(0))
                except InputError as error:
                    raise InputError(f"{url}: {error}") from None


def write_uids(url: str, batches: Iterable[Uids], chunk: int = CHUNK) -> int:
    """Write all uids of `batches` to `url`, sorted and without repeats, and return how many they are.

    At most about `chunk` uids are in memory: sorted runs go to a temporary folder and are merged range by range. The
    file is a `.npy` of dtype `u8,u8`, which numpy maps into memory.
    """
    with tempfile.TemporaryDirectory(prefix=storage.TEMPORARY_PREFIX, dir=scratch_folder(url)) as folder:
        runs = list(_sorted_runs(batches, chunk, Path(folder)))
        with large_file(url) as path, open(path, "wb") as handle:
            header = _write_header(handle, sum(map(len, runs)))
            count = 0
            for block in _merge(runs, chunk):
                handle.write(block.tobytes())
                count += len(block)
            handle.seek(0)
            if _write_header(handle, count) != header:
                raise AssertionError("numpy no longer pads its header to a fixed length")
    return count


def _sorted_runs(batches: Iterable[Uids], chunk: int, folder: Path) -> Iterator[Uids]:
    """Sorted pieces of at most `chunk` uids; all but a single one are memory maps of files in `folder`."""
    waiting: list[Uids] = []
    size = number = 0

    def flush() -> Uids:
        nonlocal waiting, size, number
        run = sort_unique(np.concatenate(waiting))
        waiting, size = [], 0
        path = folder / f"run-{number}"
        number += 1
        run.tofile(path)
        return np.memmap(path, UID_DTYPE, "r")

    for batch in batches:
        while size + len(batch) > chunk:
            head = chunk - size
            waiting.append(batch[:head])
            batch = batch[head:]
            yield flush()
        if len(batch):
            waiting.append(batch)
            size += len(batch)
    if waiting:
        yield sort_unique(np.concatenate(waiting)) if not number else flush()


def _merge(runs: list[Uids], chunk: int) -> Iterator[Uids]:
    """The distinct uids of sorted `runs` in order, in blocks of at most about 1.5 `chunk` before repeats are dropped.

    Every `step`-th uid of every run is a sample, and every `len(runs)`-th of the sorted samples a boundary: between
    two boundaries lie that many samples (and those equal to the lower one), so of each run at most `step` uids more
    than its samples account for.
    """
    if len(runs) < 2:
        yield from runs
        return
    step = max(1, chunk // (2 * len(runs)))
    samples = np.concatenate([run[::step] for run in runs])
    samples = samples[np.lexsort((samples["f1"], samples["f0"]))]
    boundaries = sort_unique(samples[len(runs) :: len(runs)].copy())
    begins = [0] * len(runs)
    for boundary in [*boundaries, None]:
        ends = [len(run) if boundary is None else int(np.searchsorted(run, boundary)) for run in runs]
        pieces = [np.asarray(run[begin:end]) for run, begin, end in zip(runs, begins, ends, strict=True)]
        yield sort_unique(np.concatenate(pieces))
        begins = ends


def _write_header(handle: IO[bytes], count: int) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(UID_DTYPE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(handle, header)
    return handle.tell()
