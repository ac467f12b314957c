"""Whether the keys of kept pairs repeat: if they do, tars with pairs of several inputs need other keys."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.emit.uids import UID_DTYPE, Uids, write_uids
from pipeline.store import storage

#: Keys compared in memory before all of them are sorted: most inputs whose keys repeat start them anew per shard.
FIRST = 1 << 20


def keys_repeat(keep_files: Iterable[str]) -> bool:
    """Whether two rows of the keep lists have the same key; memory does not grow with their number.

    Keys are compared by 128-bit hashes; a collision, at odds below 1e-18 for a billion keys, would only rename pairs.
    """
    batches = _hashes(keep_files)
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


def _hashes(keep_files: Iterable[str]) -> Iterator[Uids]:
    for url in keep_files:
        with storage.open_read(url) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(1 << 16, columns=["key"]):
                digests = (
                    hashlib.blake2b(key.encode(), digest_size=16).digest() for key in batch.column(0).to_pylist()
                )
                yield np.frombuffer(b"".join(digests), UID_DTYPE)
