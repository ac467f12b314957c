"""The bytes of one shard: complete or an error, retried where storage is remote, decompressed as its name says.

Broken *storage* (an error, a short answer) raises; broken *data* (a gzip stream that ends early) ends the stream and
is told in `ShardStream.error`. Without that difference a cut connection would look like a truncated tar.
"""

from __future__ import annotations

import io
import zlib
from typing import Any, Protocol

import zstandard
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from pipeline.errors import InputError
from pipeline.store import storage

#: Endings of shard names.
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
#: Bytes fetched from remote storage at once.
BLOCK_BYTES = 8 << 20
#: Compressed bytes that are decompressed at once.
COMPRESSED_BYTES = 8 << 10
#: Times a block is asked for before the shard is given up (the filesystem's own retries come on top).
ATTEMPTS = 4

_GONE = (FileNotFoundError, PermissionError, IsADirectoryError)
#: Answers of a web server that asking again does not change.
_FINAL_STATUS = (400, 401, 403, 404, 405, 410)
#: Where filesystems keep the version of a file, the best first.
_VERSIONS = ("ETag", "etag", "md5", "Content-MD5", "mtime", "LastModified", "Last-Modified")
_BROKEN_DATA = (EOFError, zlib.error, zstandard.ZstdError)


class _Bytes(Protocol):
    def read1(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class ShardStream:
    """Readable decompressed bytes of the shard at `url`. Raises `InputError` when storage does not give them.

    Attributes:
        position: decompressed bytes given out so far.
        error: what was wrong with the compressed data, once that is known; else "".
    """

    def __init__(self, url: str) -> None:
        self.position = 0
        self.error = ""
        name = storage.basename(url)
        self._raw = _open(url)
        self._source: _Bytes
        if name.endswith((".tar.gz", ".tgz")):
            self._source = _Gzip(self._raw)
        elif name.endswith(".tar.zst"):
            self._source = zstandard.ZstdDecompressor().stream_reader(self._raw, read_across_frames=True)
        else:
            self._source = self._raw

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end of the data or where the data are broken (see `error`)."""
        parts = []
        missing = 0 if self.error else size
        while missing > 0:
            try:
                part = self._source.read1(missing)
            except _BROKEN_DATA as error:
                self.error = f"broken compressed data: {error}"
                break
            if not part:
                break
            parts.append(part)
            missing -= len(part)
            self.position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Release the file or connection."""
        self._source.close()
        self._raw.close()


class _Gzip:
    """Decompresses gzip, and gives every byte before a damage, where `gzip.GzipFile` loses those of a whole block."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw
        self._inflate = self._member()
        self._input = b""
        self._inside = False
        self._error: zlib.error | None = None

    @staticmethod
    def _member() -> zlib._Decompress:
        return zlib.decompressobj(zlib.MAX_WBITS | 16)  # with gzip's header and trailer

    def read1(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end. Raises `zlib.error` or `EOFError` once all that is whole was given."""
        while self._error is None:
            if self._inflate.eof:
                # Another member may follow, after zeros that pad to a block of a tape.
                self._inflate, self._inside = self._member(), False
            if not self._inside:
                self._input = self._input.lstrip(b"\0")
            self._input = self._input or self._raw.read1(COMPRESSED_BYTES)
            if not self._input:
                if self._inside:
                    raise EOFError("it ends in the middle")
                return b""
            if not self._inside and not self._input.strip(b"\0"):
                continue
            self._inside = True
            if data := self._step(size):
                return data
        raise self._error

    def _step(self, size: int) -> bytes:
        before = self._inflate.copy()
        try:
            data = self._inflate.decompress(self._input, size)
        except zlib.error as error:
            self._error = error
            return self._salvaged(before)
        self._input = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
        return data

    def _salvaged(self, inflate: zlib._Decompress) -> bytes:
        """What comes before the damage: byte by byte, since a call that fails gives nothing."""
        data = bytearray()
        try:
            for place in range(len(self._input)):
                data += inflate.decompress(self._input[place : place + 1])
        except zlib.error:
            return bytes(data)
        raise AssertionError("the same bytes were broken a moment ago")

    def close(self) -> None:
        """Nothing to release: the file is another's."""


def describe(url: str) -> tuple[int, str]:
    """Size in bytes and a version of the file at `url`: its etag where storage has one, else its time of change.

    Raises `InputError` when it is not there.
    """
    fs, path = storage.filesystem(url)
    info = patiently(url, lambda: fs.info(path))
    if info.get("type") == "directory":
        raise InputError(f"{url}: expected a tar, found a folder")
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    return int(info.get("size") or 0), str(version).strip('"')


def _open(url: str) -> io.BufferedReader:
    if storage.is_local(url):
        try:
            return open(storage.local_path(url), "rb")
        except OSError as error:
            raise InputError(f"{url}: cannot be read: {error.strerror or error}") from error
    fs, path = storage.filesystem(url)
    info = patiently(url, lambda: fs.info(path))
    size = info.get("size")
    web = url.startswith(("http://", "https://"))
    if size is not None and (not web or patiently(url, lambda: answers_ranges(fs, path, size))):
        return io.BufferedReader(_Ranges(url, fs, path, int(size)))
    return io.BufferedReader(_Sequence(url, fs, path, size))


def answers_ranges(fs: Any, path: str, size: int) -> bool:
    """Whether a web server gives a part of a file when asked for it: some ignore that and send the whole of it."""
    with fs.open(path, "rb", block_size=0, size=size, headers={"Range": "bytes=0-0"}) as handle:
        return len(handle.read(2)) == 1


def patiently(url: str, ask: Any) -> Any:
    """The value of `ask()`, a question to storage about `url`, retried unless the answer is that nothing is there.

    Raises `InputError`.
    """
    # Clients of object stores raise errors of many unrelated classes, hence all but the hopeless ones.
    patience = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and not _is_final(error)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=0.1, max=5, jitter=0.1),
        reraise=True,
    )
    try:
        return patience(ask)
    except Exception as error:
        said = _server_says(error) or error
        text = " ".join(str(said).split()) or type(said).__name__
        raise InputError(f"{url}: cannot be read: {text}") from error


def _is_final(error: BaseException) -> bool:
    """Whether asking again is no use."""
    said = _server_says(error)
    return isinstance(error, _GONE) if said is None else getattr(said, "status", None) in _FINAL_STATUS


def _server_says(error: BaseException) -> BaseException | None:
    """What a web server answered, or that it did not, where fsspec says no more than that the file is not there."""
    cause = error.__cause__
    web = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and web else None


class _Ranges(io.RawIOBase):
    """A remote file read block by block, each block retried and checked for its length."""

    def __init__(self, url: str, fs: Any, path: str, size: int) -> None:
        self._url, self._fs, self._path, self._size = url, fs, path, size
        self._fetched = 0
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block and self._fetched < self._size:
            start, end = self._fetched, min(self._fetched + BLOCK_BYTES, self._size)
            self._block = memoryview(patiently(self._url, lambda: self._fetch(start, end)))
            self._fetched = end
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def _fetch(self, start: int, end: int) -> bytes:
        block: bytes = self._fs.cat_file(self._path, start=start, end=end)
        if len(block) != end - start:
            raise OSError(f"asked for {end - start} bytes at {start}, got {len(block)}")
        return block


class _Sequence(io.RawIOBase):
    """A remote file that can only be read from its beginning; it must be as long as it was said to be."""

    def __init__(self, url: str, fs: Any, path: str, size: int | None) -> None:
        self._url, self._size, self._position = url, size, 0
        self._file = patiently(url, lambda: fs.open(path, "rb", block_size=0))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._file.read(len(buffer))
        except Exception as error:
            raise InputError(f"{self._url}: broke off after {self._position} bytes: {error}") from error
        self._position += len(block)
        if not block and self._size is not None and self._position != self._size:
            raise InputError(f"{self._url}: broke off after {self._position} of {self._size} bytes")
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
