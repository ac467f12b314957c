"""How a pruned tar is laid down: headers that depend on name and size alone, so that equal members give equal bytes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from typing import IO

import numpy as np
import numpy.typing as npt

from pipeline.data.layout import BLOCK, NAME_BYTES

#: Two zero blocks end a tar; tools pad it to whole records of 20 blocks.
RECORD = 20 * BLOCK
#: Bytes that are gathered before they are written: whole blocks, few enough to stay in the processor's cache.
BUFFER_BYTES = 256 << 10

Buffer = bytes | memoryview

_ZEROS = bytes(RECORD)
_LARGEST_SIZE = 0o77777777777


def header(name: str, size: int) -> bytes:
    """The header of a regular file: mode 0644, user, group and time 0 (several blocks for a name above 100 bytes).

    Equals what `tarfile` writes in GNU format; spelled out because it is made for each member of each kept pair.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > NAME_BYTES or size > _LARGEST_SIZE:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    digits = b"%011o" % size
    checksum = _CHECKSUM_BASE + sum(encoded) + sum(digits)
    return b"".join((encoded, _ZEROS[: NAME_BYTES - len(encoded)], _AFTER_NAME, digits, _AFTER_SIZE % checksum, _TAIL))


_AFTER_NAME = b"0000644\x00" + 2 * b"0000000\x00"
_AFTER_SIZE = b"\x0000000000000\x00%06o\x00 0"
_TAIL = bytes(100) + b"ustar  \x00" + bytes(BLOCK - 265)
# The checksum counts its own eight bytes as spaces.
_CHECKSUM_BASE = sum(_AFTER_NAME) + sum(b"000000000000") + 8 * ord(" ") + sum(_TAIL)


def headers(names: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """`header` of many members: names `[m, w]` (w at most 100), filled up with zeros, and sizes `[m]`; `[m, 512]`."""
    result = np.repeat(np.frombuffer(header("", 0), np.uint8)[None], len(names), axis=0)
    result[:, : names.shape[1]] = names
    digits = (sizes[:, None] >> np.arange(30, -1, -3)) & 7
    result[:, 124:135] += digits.astype(np.uint8)
    checksum = _CHECKSUM_BASE + 11 * ord("0") + names.sum(axis=1, dtype=np.int64) + digits.sum(axis=1)
    result[:, 148:154] = ord("0") + ((checksum[:, None] >> np.arange(15, -1, -3)) & 7)
    return result


def member(name: str, content: Buffer) -> tuple[Buffer, ...]:
    """What a member is in a tar: header, content, and zeros up to a whole block."""
    size = len(content)
    fill = -size % BLOCK
    return (header(name, size), content, _ZEROS[:fill]) if fill else (header(name, size), content)


def json_of(key: str, uid: str) -> tuple[str, bytes]:
    """Name and content of the json of a pair that has none."""
    return f"{key}.json", b'{"uid": "%s"}' % uid.encode()


class ChangedError(Exception):
    """A file does not hold what was found in it before."""


class TarWriter:
    """Writes members to a local file, from memory or as blocks out of other files, by way of one small buffer.

    Reading into a buffer that stays in the cache takes half the time of writing out of a mapped file, whose pages the
    system would have to map one by one.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self._file = handle.fileno()
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._filled = 0
        self._flushed = 0

    @property
    def position(self) -> int:
        """Bytes added so far."""
        return self._flushed + self._filled

    def add(self, name: str, content: Buffer) -> None:
        """Append a member."""
        for piece in member(name, content):
            self._append(piece)

    def copy(self, file: int, begin: int, end: int, members: Sequence[tuple[int, bytes, Buffer]]) -> None:
        """Append bytes `begin` to `end` of an open file: whole members, neighbours there, in one go.

        Of each of `members` (place of its header in the file, ascending; its name; a new header) the header is
        replaced. Raises `ChangedError` when the file has no header of that name there, or ends before `end`.
        """
        waiting = iter(members)
        place, name, header = next(waiting, (end, b"", b""))
        while begin < end:
            if self._filled == BUFFER_BYTES:
                self.flush()
            size = min(BUFFER_BYTES - self._filled, end - begin)
            part = self._buffer[self._filled : self._filled + size]
            try:
                read_into(file, part, begin)
            except EOFError:
                raise ChangedError from None
            # Places and parts are whole blocks: no header lies across the end of a part.
            while place < begin + size:
                start = place - begin
                if part[start : start + len(name)] != name:
                    raise ChangedError
                part[start : start + BLOCK] = header
                place, name, header = next(waiting, (end, b"", b""))
            begin += size
            self._filled += size

    def flush(self) -> None:
        """Hand everything added so far to the system."""
        self._write(self._buffer[: self._filled])
        self._flushed += self._filled
        self._filled = 0

    def close(self) -> None:
        """End the archive: two zero blocks, padded to a whole record as `tarfile` does."""
        end = self.position + 2 * BLOCK
        self._append(_ZEROS[: 2 * BLOCK])
        self._append(_ZEROS[: -end % RECORD])
        self.flush()

    def _append(self, piece: Buffer) -> None:
        if self._filled + len(piece) > BUFFER_BYTES:
            self.flush()
        if len(piece) > BUFFER_BYTES:
            self._write(memoryview(piece))
            self._flushed += len(piece)
        else:
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)

    def _write(self, piece: memoryview) -> None:
        # A write may stop early, at 2 GiB or by a signal.
        while piece:
            piece = piece[os.write(self._file, piece) :]


def read_into(file: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with the bytes of an open file from `offset` on. Raises `EOFError` when there are fewer."""
    while buffer:
        count = os.preadv(file, [buffer], offset)
        if not count:
            raise EOFError
        buffer, offset = buffer[count:], offset + count
