"""Reading and atomically writing files by path or fsspec URL.

A local write goes to a temporary name in the same folder, is flushed to disk and renamed; on an object
store it is one upload (large ones in several parts), which shows when it is complete. A reader therefore sees a whole
file or none.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from fsspec.core import url_to_fs

#: Prefix of files that are being written. Nothing with this prefix is ever read as a result.
TEMPORARY_PREFIX = ".tmp-"


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine (no protocol, or `file://`)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The plain path of a local `url`."""
    return url.removeprefix("file://")


def join(url: str, *parts: str) -> str:
    """Append path `parts` to a path or URL with single slashes."""
    return posixpath.join(url.rstrip("/") if url != "/" else url, *parts)


def basename(url: str) -> str:
    """The last component of a path or URL, without a query."""
    return posixpath.basename(url.split("?", 1)[0] if "://" in url else url)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of `url` and the path within it; it answers nothing from an earlier listing.

    Other processes write, replace and remove files all the time.
    """
    fs, path = url_to_fs(url)
    fs.invalidate_cache()
    return fs, path


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(url):
        return os.path.exists(local_path(url))
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def size(url: str) -> int:
    """Bytes of a file. Raises `FileNotFoundError`."""
    if is_local(url):
        return os.path.getsize(local_path(url))
    fs, path = filesystem(url)
    return int(fs.size(path))


def open_read(url: str) -> IO[bytes]:
    """Open for reading bytes, as stored (no decompression)."""
    if is_local(url):
        return open(local_path(url), "rb")
    fs, path = filesystem(url)
    handle: IO[bytes] = fs.open(path, "rb")
    return handle


def read_bytes(url: str) -> bytes:
    """The whole file."""
    with open_read(url) as handle:
        return handle.read()


def read_json(url: str) -> Any:
    """A JSON file's value. Raises `FileNotFoundError`, and `ValueError` on text that is not JSON."""
    return json.loads(read_bytes(url))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file atomically, replacing what was there."""
    if not is_local(url):
        fs, path = filesystem(url)
        fs.pipe_file(path, data)
        return
    with atomic_path(local_path(url)) as temporary, open(temporary, "wb") as handle:
        handle.write(data)


def write_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically; key order is kept.

    Raises `ValueError` for numbers that are not finite (`without_nan`).
    """
    write_bytes(url, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def without_nan(value: Any) -> Any:
    """`value` as JSON can have it: null for numbers that are not finite, in dictionaries within dictionaries, too."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """A temporary local path that takes the name `path` when the block ends without an error."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{os.path.basename(path)}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def atomic_writer(url: str) -> Iterator[IO[bytes]]:
    """A binary stream whose content becomes the file `url` when the block ends without an error.

    Local content streams to a temporary file; for an object store it is held in memory and uploaded once.
    """
    if is_local(url):
        with atomic_path(local_path(url)) as temporary, open(temporary, "wb") as handle:
            yield handle
        return
    buffer = io.BytesIO()
    yield buffer
    write_bytes(url, buffer.getvalue())


def list_files(folder: str, suffix: str = "") -> list[str]:
    """Full URLs of the files right in `folder` that end in `suffix`, sorted; temporary ones are left out."""
    if is_local(folder):
        path = local_path(folder)
        names = os.listdir(path) if os.path.isdir(path) else []
        found = [name for name in names if os.path.isfile(os.path.join(path, name))]
    else:
        fs, path = filesystem(folder)
        entries = fs.ls(path, detail=True) if fs.exists(path) else []
        found = [posixpath.basename(entry["name"]) for entry in entries if entry["type"] == "file"]
        fs.invalidate_cache()  # it keeps more than a kilobyte per file
    return sorted(
        join(folder, name) for name in found if name.endswith(suffix) and not name.startswith(TEMPORARY_PREFIX)
    )


def make_folder(url: str) -> None:
    """Create a folder and its parents; object stores need none."""
    if is_local(url):
        os.makedirs(local_path(url), exist_ok=True)


def remove(url: str) -> None:
    """Remove a file if it is there."""
    if is_local(url):
        with suppress(FileNotFoundError):
            os.unlink(local_path(url))
        return
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_folder(url: str) -> None:
    """Remove a folder, if it is there, with everything in it: on an object store many files per request."""
    if is_local(url):
        if os.path.isdir(local_path(url)):
            shutil.rmtree(local_path(url))
        return
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def remove_temporary(folder: str, *, below: bool = True) -> None:
    """Remove what writers that were killed left in a local `folder`; object stores show no partial objects.

    Parts of an upload that was killed are for the bucket's own rules.
    For when the work on the folder is settled: a writer that is still at it would fail, and its work be repeated.
    `below=False` looks right in the folder alone.
    """
    if not is_local(folder):
        return
    for path, folders, files in os.walk(local_path(folder)):
        for name in [name for name in files if name.startswith(TEMPORARY_PREFIX)]:
            remove(os.path.join(path, name))
        for name in [name for name in folders if name.startswith(TEMPORARY_PREFIX)]:
            folders.remove(name)
            shutil.rmtree(os.path.join(path, name), ignore_errors=True)
        if not below:
            return


def checksum(data: bytes) -> str:
    """BLAKE2b-128 hex digest of `data`: the checksum in every commit mark and fingerprint."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_checksum(url: str, block_bytes: int = 1 << 20) -> str:
    """`checksum` of a file's content, read in blocks."""
    digest = hashlib.blake2b(digest_size=16)
    with open_read(url) as handle:
        while block := handle.read(block_bytes):
            digest.update(block)
    return digest.hexdigest()
