"""Where the samples of a plain tar of the usual form lie: what the reader would find, in a few numpy passes."""

from __future__ import annotations

import mmap
import re
import tarfile
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

#: Tars come in blocks of this many bytes.
BLOCK = 512
#: Longer names need a header of their own.
NAME_BYTES = 100

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

#: Samples of more members are left to slower ways.
_MOST_MEMBERS = 16
_REGULAR, _OLD_REGULAR, _FOLDER, _PAX = b"0\x005x"
_DOT, _SLASH = b"./"
#: Pax records that say something about name or size.
_TELLING = {"path", "size"}
_RECORD = re.compile(rb"([1-9][0-9]{0,4}) [^=]+=")


@dataclass(frozen=True)
class Layout:
    """The members of a tar that belong to samples, in order.

    Attributes:
        names: uint8 `[m, w]`, ASCII, filled up with zeros to the longest (at most 100).
        keys: of the samples, bytes `[samples]`.
        data: where the content starts, int64 `[m]`; whole blocks of it are there.
        sizes: of the content, int64 `[m]`.
        json: whether the member is its sample's json, bool `[m]`.
        first: number of the first member of each sample, int64 `[samples + 1]`, the number of members last.
    """

    names: Bytes
    keys: npt.NDArray[np.bytes_]
    data: Int64
    sizes: Int64
    json: Bool
    first: Int64

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def ends(self) -> Int64:
        """Where the blocks of the content end, int64 `[m]`."""
        return self.data + (self.sizes + BLOCK - 1) // BLOCK * BLOCK

    def spans(self) -> list[tuple[int, int]]:
        """Where each sample begins and ends, headers and what fills the last block included."""
        begins, ends = self.data[self.first[:-1]] - BLOCK, self.ends[self.first[1:] - 1]
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    def repeats(self) -> Bool:
        """Whether an earlier sample has the same key, bool `[samples]`."""
        _, first = np.unique(self.keys, return_index=True)
        repeats = np.ones(len(self), bool)
        repeats[first] = False
        return repeats

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """Ending (in lower case, without its dot), start and end of the content of a sample's members, in order."""
        rows = range(int(self.first[sample]), int(self.first[sample + 1]))
        skip = len(self.keys[sample]) + 1
        endings = [bytes(self.names[row]).rstrip(b"\0")[skip:].decode().lower() for row in rows]
        return [
            (end, int(self.data[row]), int(self.data[row] + self.sizes[row]))
            for end, row in zip(endings, rows, strict=True)
        ]

    def of(self, samples: Int64) -> Layout:
        """The layout of some samples (numbers `[k]`), in that order."""
        starts = self.first[samples]
        counts = self.first[samples + 1] - starts
        first = np.concatenate([[0], np.cumsum(counts)])
        rows = np.arange(first[-1]) + np.repeat(starts - first[:-1], counts)
        return Layout(self.names[rows], self.keys[samples], self.data[rows], self.sizes[rows], self.json[rows], first)


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def find_layout(content: bytes | mmap.mmap, whole: bool = False) -> Layout | None:
    """The layout of a tar, of which only headers are touched; None for one of another than the usual form.

    The usual form has short ASCII names with a key and an ending each, and pax records, if any, that say nothing
    about name and size (webdataset's own writer puts the time there). Of a tar that breaks off it has the whole
    members; with `whole` the layout of such a one, or of one with a damaged header, is None as well.
    """
    walked = _walk(content)
    if walked is None:
        return None
    places, sizes = walked
    blocks = np.frombuffer(content, np.uint8, len(content) // BLOCK * BLOCK).reshape(-1, BLOCK)
    rows = places // BLOCK
    if whole and not (len(places) and _is_sound(blocks, rows, sizes)):
        return None
    kinds = blocks[rows, 156]
    pax = np.flatnonzero(kinds == _PAX)
    if len(pax) and not _only_times(blocks, places, pax):
        return None
    members = np.flatnonzero((kinds == _REGULAR) | (kinds == _OLD_REGULAR))
    # `tarfile` looks for the next header right behind a folder's, whatever size that claims.
    if len(members) + len(pax) + np.count_nonzero((kinds == _FOLDER) & (sizes == 0)) < len(kinds):
        return None
    if len(members) and places[members[-1]] + BLOCK + padded(int(sizes[members[-1]])) > len(content):
        return None
    rows = rows[members]
    if blocks[rows, 345].any() or (blocks[rows, 135] > ord(" ")).any():
        return None
    return _group(blocks[:, :NAME_BYTES][rows], places[members] + BLOCK, sizes[members])


class Headers:
    """Gathers the layout of a tar whose headers are read one after another."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._places: list[tuple[int, int]] = []
        self._usual = True

    def add(self, header: tarfile.TarInfo, field: bytes, room: int) -> None:
        """The next header: with the name in its own field, and the bytes up to the header after it."""
        if header.isdir() and not header.size:
            return
        self._usual &= header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not header.issparse()
        # Headers before it may say something else, for it or for all.
        self._usual &= header.name.isascii() and header.name.encode() == field and padded(header.size) == room
        self._usual &= not header.pax_headers.keys() & _TELLING
        if self._usual:
            self._names.append(header.name.encode())
            self._places.append((header.offset_data, header.size))

    def layout(self) -> Layout | None:
        """Where the samples lie; None for a tar without any, or of another than the usual form (`find_layout`)."""
        if not self._usual or not self._names:
            return None
        names = np.array(self._names, f"S{NAME_BYTES}").view(np.uint8).reshape(-1, NAME_BYTES)
        data, sizes = np.array(self._places, np.int64).T
        return _group(names, data.copy(), sizes.copy())


def to_columns(layout: Layout) -> dict[str, pa.Array]:
    """A layout as Arrow columns with a list per sample, for `from_columns`."""
    offsets = pa.array(layout.first.astype(np.int32))
    width = layout.names.shape[1]
    members = {
        "names": pa.array(layout.names.view(f"S{width}").reshape(-1).tolist(), pa.binary()),
        "data": pa.array(layout.data),
        "sizes": pa.array(layout.sizes),
        "json": pa.array(layout.json),
    }
    return {name: pa.ListArray.from_arrays(offsets, values) for name, values in members.items()}


def from_columns(table: pa.Table) -> Layout:
    """The layout in a table with the columns that `to_columns` made, and the samples' keys in `key`."""
    columns = {name: table[name].combine_chunks() for name in ("names", "data", "sizes", "json")}
    flat = {name: column.flatten() for name, column in columns.items()}
    names = np.array(flat["names"].to_pylist(), "S")
    counts = columns["sizes"].value_lengths().to_numpy(zero_copy_only=False)
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    data, sizes = (flat[name].to_numpy() for name in ("data", "sizes"))
    json = flat["json"].to_numpy(zero_copy_only=False)
    keys = np.array([key.encode() for key in table["key"].to_pylist()], "S")
    return Layout(names.view(np.uint8).reshape(len(names), names.itemsize), keys, data, sizes, json, first)


def _walk(content: bytes | mmap.mmap) -> tuple[Int64, Int64] | None:
    """Places of all headers, in order, and the sizes in them; None where a size is not plain octal digits."""
    places: list[int] = []
    sizes: list[int] = []
    offset = 0
    stop = len(content) - BLOCK
    try:
        # Every header of every input passes through here: nothing but the jump to the next one.
        while offset <= stop:
            size = int(content[offset + 124 : offset + 135], 8)
            if size < 0:
                return None
            places.append(offset)
            sizes.append(size)
            offset += (size + 1023) & -512
    except ValueError:
        if any(content[offset : offset + BLOCK]):
            return None
    return np.array(places, np.int64), np.array(sizes, np.int64)


def _is_sound(blocks: Bytes, rows: Int64, sizes: Int64) -> bool:
    """Whether `tarfile` accepts each header (rows of `blocks`) with the size found in it, and then finds the end."""
    end = int(rows[-1]) + 1 + padded(int(sizes[-1])) // BLOCK
    if end >= len(blocks) or blocks[end].any():
        return False
    try:
        for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):
            header = tarfile.TarInfo.frombuf(blocks[row].tobytes(), "utf-8", "surrogateescape")
            pax = header.type == tarfile.XHDTYPE
            if header.size != size or (pax and not _are_records(blocks[row + 1 : row + 2].tobytes()[:size])):
                return False
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    return not pax  # what it speaks of is missing


def _are_records(content: bytes) -> bool:
    """Whether the content of a pax header is `length key=value` records, each ending in a newline."""
    position = 0
    while position < len(content):
        match = _RECORD.match(content, position)
        if match is None or content[position + int(match[1]) - 1 : position + int(match[1])] != b"\n":
            return False
        position += int(match[1])
    return True


def _only_times(blocks: Bytes, places: Int64, pax: Int64) -> bool:
    """Whether pax headers (rows of `places`) have a block of records each that change neither name nor size."""
    if pax[-1] + 1 == len(places):
        pax = pax[:-1]
    if (places[pax + 1] - places[pax] != 2 * BLOCK).any():
        return False
    records = blocks[places[pax] // BLOCK + 1].tobytes()
    return not any(word in records for word in (b" path=", b" size=", b"GNU.sparse"))


def _group(names: Bytes, data: Int64, sizes: Int64) -> Layout | None:
    """The samples of members: for names with a key and an ending each, whose endings do not repeat within a key."""
    count = len(names)
    if not count:
        return Layout(names, np.zeros(0, "S1"), data, sizes, np.zeros(0, bool), np.zeros(1, np.int64))
    # Most names are far shorter than their field: what is done per character is done on the used columns alone.
    width = int(np.flatnonzero(names.any(axis=0))[-1:].sum()) + 1
    text = np.ascontiguousarray(names[:, :width])
    columns = np.arange(width)
    ends = np.where(text[:, -1] != 0, width, (text == 0).argmax(axis=1))
    text[columns >= ends[:, None]] = 0
    slashes = text == _SLASH
    base: Int64 | int = 0
    if slashes.any():
        base = np.where(slashes.any(axis=1), width - slashes[:, ::-1].argmax(axis=1), 0)
    # `argmax` of no dot at all is 0, which is never above `base`.
    dots = text == _DOT
    dot = (dots if isinstance(base, int) else dots & (columns >= base[:, None])).argmax(axis=1)
    hidden = (names[:, 0] == ord("_")) & (names[:, 1] == ord("_"))
    if (dot <= base).any() or hidden.any() or text.max() > 127:
        return None
    keys = np.where(columns < dot[:, None], text, np.uint8(0)).view(f"S{width}").reshape(-1)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    first = np.append(starts, count)
    counts = np.diff(first)
    most = int(counts.max())
    if most > _MOST_MEMBERS:
        return None
    lower = np.frombuffer(text.tobytes().lower(), f"S{width}")
    group = np.repeat(np.arange(len(starts)), counts)
    for lag in range(1, most):
        if ((lower[lag:] == lower[:-lag]) & (group[lag:] == group[:-lag])).any():
            return None
    json = np.flatnonzero(ends - dot == len(".json"))
    letters = lower.view(np.uint8).reshape(-1, width)[json[:, None], dot[json, None] + np.arange(5)]
    is_json = np.zeros(count, bool)
    is_json[json] = (letters == list(b".json")).all(axis=1)
    return Layout(text, keys[starts], data, sizes, is_json, first)
