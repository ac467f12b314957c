"""Where each member of a plain tar lies: found by the inventory, kept beside it, and believed while the tar stays as it
is. Whoever copies or opens members need not walk through the tar again.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.layout import Layout, find_layout, from_columns, to_columns
from pipeline.data.stream import describe
from pipeline.errors import InputError
from pipeline.store import storage

#: Key of the Parquet file's metadata that says which version of which shard it is about.
_SHARD = b"shard"


def is_mappable(url: str) -> bool:
    """Whether a shard is a local, uncompressed file, whose members can be reached without reading what is between."""
    return storage.is_local(url) and url.endswith(".tar")


def map_file(url: str) -> memoryview:
    """A local file mapped into memory; the map lives as long as the last view of it."""
    with open(storage.local_path(url), "rb") as handle:
        if not os.fstat(handle.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))


def locate_members(url: str, whole: bool = False) -> Layout | None:
    """The layout of a plain local tar of the usual form (see `find_layout`); None for any other shard."""
    return find_layout(map_file(url).obj, whole) if is_mappable(url) else None  # type: ignore[arg-type]


def write_places(places: str, url: str, size: int, version: str, layout: Layout) -> None:
    """Keep the layout of the shard at `url`, of that size and version, at `places` (Parquet, a row per sample)."""
    columns = {"key": pa.array([key.decode() for key in layout.keys.tolist()]), **to_columns(layout)}
    table = pa.table(columns).replace_schema_metadata({_SHARD: _identity(url, size, version)})
    with storage.atomic_writer(places) as handle:
        pq.write_table(table, handle, compression="zstd", use_dictionary=False)


def read_places(places: str, url: str, samples: Sequence[int] | None = None) -> Layout | None:
    """The layout of some samples (numbers, any order; None: all) of the shard at `url`, as it is kept at `places`.

    None where nothing is kept, or that is about another version of the shard, or about fewer samples.
    """
    if not storage.exists(places):
        return None
    try:
        size, version = describe(url)
    except InputError:
        return None
    with storage.open_read(places) as handle, pq.ParquetFile(handle) as file:
        if (file.schema_arrow.metadata or {}).get(_SHARD) != _identity(url, size, version):
            return None
        if samples is not None and max(samples, default=-1) >= file.metadata.num_rows:
            return None
        table = file.read(use_threads=False)
        return from_columns(table if samples is None else table.take(pa.array(samples, pa.int64())))


def _identity(url: str, size: int, version: str) -> bytes:
    return f"{url} {size} {version}".encode()
