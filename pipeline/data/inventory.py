"""Which shards a run works on: where each is, how many samples it has, and which version of it that was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.places import locate_members, write_places
from pipeline.data.reader import read_shard
from pipeline.data.stream import describe
from pipeline.errors import InputError
from pipeline.store import ahead, storage

_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("url", pa.string()),
        ("name", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("end_error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One input shard.

    Attributes:
        index: its number in the run, from 0.
        url: where it is.
        name: its file name, part of the uid of samples that bring none.
        samples: samples in it, bad ones included.
        bytes: its size on storage.
        etag: its version: the object's etag, or the file's time of change.
        end_error: where and why the tar breaks off; "" for a whole one.
    """

    index: int
    url: str
    name: str
    samples: int
    bytes: int
    etag: str
    end_error: str = ""


def inspect_shard(index: int, url: str, places: str | None = None) -> ShardInfo:
    """Count the samples of a shard: by its headers if it is a sound, plain, local tar, else by reading through it.

    With `places`, where the members lie is kept there for a sound tar of the usual form that is not compressed.
    Raises `InputError` when storage fails.
    """
    size, etag = describe(url)
    try:
        layout = locate_members(url, whole=True)
    except OSError as error:
        raise InputError(f"{url}: cannot be read: {error.strerror or error}") from None
    if layout is not None:
        samples, end_error = len(layout), ""
    else:
        with read_shard(url) as reader:
            samples, layout = reader.locate()
        end_error = reader.end_error
    if places is not None and layout is not None and url.endswith(".tar"):
        write_places(places, url, size, etag, layout)
    return ShardInfo(index, url, storage.basename(url), samples, size, etag, end_error)


def changed_shards(infos: Sequence[ShardInfo]) -> Iterator[tuple[ShardInfo, str]]:
    """The shards that are not as they were counted, each with a sentence that says so.

    Asks storage once for each shard. Raises `InputError` for one that is not there any more.
    """
    for info, (_, size, etag) in zip(infos, versions([info.url for info in infos]), strict=True):
        if (size, etag) != (info.bytes, info.etag):
            yield info, _changed(info, size, etag)


def versions(urls: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """File name, bytes and version (etag or time of change) of each file, in order.

    Raises `InputError` for one that is not there.
    """
    for url, (size, etag) in zip(urls, ahead.in_order(describe, urls), strict=True):
        yield storage.basename(url), size, etag


def check_unchanged(info: ShardInfo) -> None:
    """Raises `InputError` when the shard is not as it was counted.

    Of a local file only the size is looked at: a machine's own copy of it may have another time of change.
    """
    size, etag = describe(info.url)
    if size != info.bytes or (etag != info.etag and not storage.is_local(info.url)):
        raise InputError(_changed(info, size, etag))


def _changed(info: ShardInfo, size: int, etag: str) -> str:
    return (
        f"{info.url}: expected the shard of the inventory ({info.bytes:,} bytes, version {info.etag or 'unknown'}), "
        f"found another one ({size:,} bytes, version {etag or 'unknown'})"
    )


def write_inventory(url: str, infos: list[ShardInfo]) -> None:
    """Write the inventory as Parquet, one row per shard, atomically."""
    columns = {name: [getattr(info, name) for info in infos] for name in _SCHEMA.names}
    with storage.atomic_writer(url) as handle:
        pq.write_table(pa.table(columns, schema=_SCHEMA), handle, compression="zstd")


def read_inventory(url: str) -> list[ShardInfo]:
    """The shards of an inventory in order. Raises `FileNotFoundError` where there is none."""
    with storage.open_read(url) as handle:
        table = pq.read_table(handle)
    return [ShardInfo(**row) for row in table.select(_SCHEMA.names).to_pylist()]
