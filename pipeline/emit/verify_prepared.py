"""Checks what pairs are scored with, checkpoints and directions, against the mark of the directions."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.models.manifest import Manifest
from pipeline.run import RunFolder
from pipeline.store import marks, storage


def check_prepared(run: RunFolder) -> Iterator[str]:
    """Problems of checkpoints and directions; none before the directions are complete."""
    mark = marks.read_mark(run.directions_mark)
    if mark is None:
        return
    try:
        listed = [entry.path for entry in Manifest.read(run.checkpoint_manifest).checkpoints]
    except InputError as error:
        yield str(error)
        return
    digests = mark.get("checkpoints", [])
    if len(listed) != len(digests):
        expected = f"expected the {len(digests)} checkpoints that directions were computed at"
        yield f"{run.checkpoint_manifest}: {expected}, found {len(listed)}"
        return
    files = {storage.join(run.directions, name): digest for name, digest in mark.get("files", {}).items()}
    for url, digest in [*zip(listed, digests, strict=True), *files.items()]:
        if not storage.exists(url):
            yield f"{url}: missing, though {run.directions_mark} says that it is there"
        elif storage.file_checksum(url) != digest:
            yield f"{url}: changed since the directions were computed: its checksum is not {digest}"
