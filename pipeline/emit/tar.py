"""How a pruned tar is laid down: headers that depend on name and size alone, so that equal members give equal bytes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from typing import IO

import numpy as np
import numpy.typing as npt

#: Tars come in blocks of this many bytes.
BLOCK = 512
#: Two zero blocks end a tar; tools pad it to whole records of 20 blocks.
RECORD = 20 * BLOCK
#: Longer names need a header of their own.
NAME_BYTES = 100
#: Pieces handed to the system at a time, and their bytes.
MAX_PIECES = 512
MAX_BYTES = 4 << 20

Buffer = bytes | memoryview

_ZEROS = bytes(RECORD)
_LARGEST_SIZE = 0o77777777777


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


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


class TarWriter:
    """Writes members to a local file in large vectored writes; content may lie in a mapped file and is not copied."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._file = handle.fileno()
        self._pieces: list[Buffer] = []
        self._waiting = 0
        self._flushed = 0

    @property
    def position(self) -> int:
        """Bytes added so far."""
        return self._flushed + self._waiting

    def add(self, name: str, content: Buffer) -> None:
        """Append a member."""
        pieces = member(name, content)
        self.add_pieces(pieces, sum(map(len, pieces)))

    def add_pieces(self, pieces: Sequence[Buffer], size: int) -> None:
        """Append what whole members are in a tar, `size` bytes together."""
        self._pieces += pieces
        self._waiting += size
        if self._waiting >= MAX_BYTES or len(self._pieces) >= MAX_PIECES:
            self.flush()

    def flush(self) -> None:
        """Hand everything added so far to the system; content buffers may be released afterwards."""
        pieces, self._pieces = self._pieces, []
        while pieces:
            written = os.writev(self._file, pieces)
            # A write may stop early (at 2 GiB, or by a signal): go on within the piece where it did.
            done = 0
            while done < len(pieces) and written >= len(pieces[done]):
                written -= len(pieces[done])
                done += 1
            del pieces[:done]
            if written:
                pieces[0] = memoryview(pieces[0])[written:]
        self._flushed += self._waiting
        self._waiting = 0

    def close(self) -> None:
        """End the archive: two zero blocks, padded to a whole record as `tarfile` does."""
        end = self.position + 2 * BLOCK
        self._pieces.append(_ZEROS[: 2 * BLOCK])
        if fill := -end % RECORD:
            self._pieces.append(_ZEROS[:fill])
        self._waiting += 2 * BLOCK + fill
        self.flush()
