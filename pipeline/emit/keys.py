"""Whether the keys of kept pairs repeat: if they do, tars with pairs of several inputs need other keys."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.emit.uids import UID_DTYPE, Uids, write_uids
from pipeline.store import storage

#: Keys compared in memory before all of them are sorted: most inputs whose keys repeat start them anew per shard.
FIRST = 1 << 20
#: Bytes of a key that is compared as it is.
SHORT = 15


def keys_repeat(keep_files: Iterable[str]) -> bool:
    """Whether two rows of the keep lists have the same key; memory does not grow with their number.

    Keys are compared by 128 bits: those of at most `SHORT` bytes exactly, longer ones by a hash. A collision, at odds
    below 1e-18 for a billion keys, would only rename pairs.
    """
    batches = _words(keep_files)
    first: list[Uids] = []
    count = 0
    while count < FIRST and (batch := next(batches, None)) is not None:
        first.append(batch)
        count += len(batch)
    if not first:
        return False
    seen = np.concatenate(first)
    if len(np.unique(seen)) < len(seen):
        return True

    def counted() -> Iterator[Uids]:
        nonlocal count
        yield seen
        for batch in batches:
            count += len(batch)
            yield batch

    with tempfile.TemporaryDirectory() as folder:
        return write_uids(str(Path(folder) / "keys.npy"), counted()) < count


def _words(keep_files: Iterable[str]) -> Iterator[Uids]:
    for url in keep_files:
        with storage.open_read(url) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(1 << 16, columns=["key"]):
                yield key_words(batch.column(0))


def key_words(keys: pa.Array) -> Uids:
    """128 bits of each key `[n]`: its bytes and their number if these are few, else a hash of them."""
    keys = keys.cast(pa.large_binary())
    if not len(keys):
        return np.empty(0, UID_DTYPE)
    ends = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset : keys.offset + len(keys) + 1]
    starts, lengths = ends[:-1], np.diff(ends)
    columns = np.arange(SHORT)
    inside = columns < np.where(lengths <= SHORT, lengths, 0)[:, None]
    result = np.zeros((len(keys), 16), np.uint8)
    if inside.any():
        text = np.frombuffer(keys.buffers()[2], np.uint8)
        result[:, :SHORT][inside] = text[(starts[:, None] + columns)[inside]]
    result[:, SHORT] = lengths
    for row in np.flatnonzero(lengths > SHORT).tolist():
        digest = hashlib.blake2b(keys[row].as_py(), digest_size=16).digest()
        result[row] = np.frombuffer(digest, np.uint8)
        # No number of few bytes: a hash is never taken for a short key.
        result[row, SHORT] |= 128
    return result.view(UID_DTYPE).reshape(-1)
