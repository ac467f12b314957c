"""Writing files too large for memory: streamed to a local disk, then renamed or uploaded in one atomic step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.store import storage


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
