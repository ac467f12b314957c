"""The samples of a tar with the bytes of their members, numbered as the reader numbers them."""

from __future__ import annotations

import tarfile
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TypeVar

from pipeline.data.layout import BLOCK, padded
from pipeline.data.naming import group
from pipeline.data.places import is_mappable, map_file
from pipeline.data.reader import Members, ShardReader
from pipeline.data.stream import ShardStream
from pipeline.emit.tar import Buffer
from pipeline.errors import InputError

T = TypeVar("T")

_REGULAR, _OLD_REGULAR, _FOLDER, _LONG_NAME, _PAX = b"0\x005Lx"


@dataclass(slots=True, frozen=True)
class Sample:
    """The members that follow each other with one key.

    Attributes:
        index: place within the shard, from 0.
        key: what the members' names share.
        members: the rest of each name (with its dot) and the content, in order.
    """

    index: int
    key: str
    members: list[tuple[str, Buffer]]


#: Where a member lies in an uncompressed tar: the start of its headers, the start of its content, its size.
Extent = tuple[int, int, int]


class UnusualTarError(Exception):
    """A tar with entries that `scan` leaves to `tarfile`: links, sparse files, global headers, folders with a size, and
    headers that are odd or speak against each other.
    """


def scan(view: memoryview) -> Iterator[tuple[str, Extent]]:
    """Name and place of the regular files of a mapped tar, in order, without touching their content.

    Knows plain headers, GNU long names and pax records, which is what `tarfile` and webdataset write. Stops where the
    tar ends or breaks off: the last member is always whole. Raises `UnusualTarError` on anything rarer.
    """
    offset = first = 0
    stop = len(view)
    name, long_size = "", -1
    # Every header of every input passes through here, hence no calls in the usual case.
    while offset + BLOCK <= stop:
        header = view[offset : offset + BLOCK].tobytes()
        if not header[0] and not any(header):
            return
        kind = header[156]
        try:
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        except ValueError:
            raise UnusualTarError from None
        if size < 0 or (kind == _OLD_REGULAR and (name or long_size >= 0)):
            raise UnusualTarError
        data = offset + BLOCK
        offset = data + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind in (_REGULAR, _OLD_REGULAR):
            if long_size >= 0:
                size = long_size
                offset = data + padded(size)
            if data + size > stop:
                return
            if not name:
                end = header.find(0, 0, 100)
                name = _posix_name(header) if header[345] else _text(header[: end if end >= 0 else 100])
            if name[-1:] != "/":
                yield name, (first, data, size)
            elif size:
                raise UnusualTarError
        elif kind == _LONG_NAME:
            name = _told(name, bytes(view[data : data + size]).split(b"\0", 1)[0])
        elif kind == _PAX:
            records = _pax_records(bytes(view[data : data + size]))
            if b"path" in records:
                name = _told(name, records[b"path"])
            if b"size" in records:
                if long_size >= 0 or not records[b"size"].isdigit():
                    raise UnusualTarError
                long_size = int(records[b"size"])
        elif kind != _FOLDER or size:
            raise UnusualTarError
        if kind != _LONG_NAME and kind != _PAX:
            first, name, long_size = offset, "", -1


def read_samples(url: str, indices: Sequence[int]) -> Iterator[Sample]:
    """The samples of a shard with these indices, which ascend, in order.

    A plain local tar is mapped: contents are views of it, and what lies between is not read. Any other shard is read
    and decompressed from its beginning. Raises `InputError` when the shard has fewer samples.
    """
    done = 0
    if is_mappable(url):
        view = map_file(url)
        try:
            for index, (key, extents) in _pick(group(scan(view)), indices):
                yield Sample(index, key, _views(view, extents))
                done += 1
        except UnusualTarError:
            pass
    if done < len(indices):
        for index, (key, members) in _pick(_stream(url, frozenset(indices[done:])), indices[done:]):
            yield Sample(index, key, members)
            done += 1
    if done < len(indices):
        raise too_few(url, indices[done])


def read_keys(url: str) -> list[str]:
    """The keys of all samples of a shard, in order, up to where it ends or breaks off."""
    if is_mappable(url):
        try:
            return [key for key, _ in group(scan(map_file(url)))]
        except UnusualTarError:
            pass
    with ShardReader(url) as reader:
        return reader.keys()


def locate_samples(url: str, indices: Sequence[int]) -> list[tuple[int, int]] | None:
    """Where the samples with these indices (ascending) start and end in a plain local tar; None for other shards.

    Raises `InputError` when the tar has fewer samples.
    """
    if not is_mappable(url):
        return None
    spans = []
    try:
        for _, (_, extents) in _pick(group(scan(map_file(url))), indices):
            _, data, size = extents[-1][1]
            spans.append((extents[0][1][0], data + padded(size)))
    except UnusualTarError:
        return None
    if len(spans) < len(indices):
        raise too_few(url, indices[len(spans)])
    return spans


def sample_in(content: Buffer, index: int) -> Sample:
    """The one sample, number `index` of its shard, in the bytes between the places that `locate_samples` found."""
    view = memoryview(content)
    ((key, extents),) = group(scan(view))
    return Sample(index, key, _views(view, extents))


def _pick(values: Iterable[T], indices: Sequence[int]) -> Iterator[tuple[int, T]]:
    """The values at ascending `indices`, with these; stops after the last one, or where the values end."""
    wanted = iter(indices)
    following = next(wanted, None)
    if following is None:
        return
    for index, value in enumerate(values):
        if index == following:
            yield index, value
            following = next(wanted, None)
            if following is None:
                return


def _stream(url: str, wanted: Container[int]) -> Iterator[tuple[str, list[tuple[str, Buffer]]]]:
    """Key and members of the samples of any shard, in order, up to where the tar ends or breaks off.

    Only those of the samples with the numbers `wanted` have their content: others may be larger than the memory.
    """
    with closing(ShardStream(url)) as stream:
        members = Members(stream)

        def content(number: int, header: tarfile.TarInfo) -> bytes:
            if number not in wanted:
                return b""
            there = min(header.size, members.room)
            found = members.whole(header)
            if len(found) < there:
                raise tarfile.ReadError("unexpected end of data")
            return found

        with suppress(tarfile.TarError):
            yield from group(((header.name, header) for header in members if header.isreg()), content)


def _views(view: memoryview, extents: list[tuple[str, Extent]]) -> list[tuple[str, Buffer]]:
    return [(ending, view[data : data + size]) for ending, (_, data, size) in extents]


def _posix_name(header: bytes) -> str:
    """The name in a header that uses the field which POSIX has for the front of a long name, and GNU for times."""
    if header[257:263] != b"ustar\0":
        raise UnusualTarError
    return _text(header[345:500].split(b"\0", 1)[0] + b"/" + header[:100].split(b"\0", 1)[0])


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _told(name: str, new: bytes) -> str:
    """The name that a header tells of the member after it; `name` is what one before it has told already."""
    if name or not new or new.endswith(b"/"):
        raise UnusualTarError
    return _text(new)


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """`length key=value` records, each ending in a newline that the length counts."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 8)
        length = int(content[position:space]) if space > 0 and content[position:space].isdigit() else 0
        key, equals, value = content[space + 1 : position + length - 1].partition(b"=")
        end = content[position + length - 1 : position + length]
        if not key or not equals or end != b"\n" or key in records or key.startswith(b"GNU.sparse"):
            raise UnusualTarError
        records[key] = value
        position += length
    return records


def too_few(url: str, index: int) -> InputError:
    """The error for a shard with fewer samples than `index` + 1."""
    return InputError(f"{url}: expected a sample number {index}, found the end of the tar before it")
