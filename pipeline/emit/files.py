"""Local files that are large or many: written and then renamed or uploaded in one step, read through few open ones."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.emit.tar import read_into
from pipeline.store import storage

#: Input files that are open at a time: far below what systems allow a process.
OPEN_FILES = 128


@contextmanager
def large_file(url: str) -> Iterator[str]:
    """A local path to write to, whose content becomes the file `url` when the block ends without an error."""
    if storage.is_local(url):
        with storage.atomic_path(storage.local_path(url)) as path:
            yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, storage.basename(url))
        yield path
        fs, target = storage.filesystem(url)
        fs.put_file(path, target)


def scratch_folder(url: str) -> str | None:
    """Where temporary files of about the size of the file `url` go: beside it if it is local (None: the default)."""
    if not storage.is_local(url):
        return None
    folder = os.path.dirname(os.path.abspath(storage.local_path(url)))
    os.makedirs(folder, exist_ok=True)
    return folder


class OpenFiles:
    """Descriptors of local files, of which the last used `OPEN_FILES` stay open; a context manager."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, url: str) -> int:
        """That of a local file; good until the next call."""
        found = self._open.get(url)
        if found is None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            found = self._open[url] = os.open(storage.local_path(url), os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._open.move_to_end(url)
        return found

    def read(self, url: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of a local file. Raises `EOFError` when it has fewer."""
        content = bytearray(end - begin)
        read_into(self.descriptor(url), memoryview(content), begin)
        return bytes(content)
