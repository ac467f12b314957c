"""Commit marks: the small JSON file, written last, that says a unit of work is complete and what decided it."""

from __future__ import annotations

from typing import Any

from pipeline.errors import FingerprintError, InputError
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint, name_differences


def write_mark(url: str, fingerprint: Fingerprint, content: dict[str, Any]) -> None:
    """Commit: write `content` with the fingerprint and its parts, in one atomic step."""
    storage.write_json(url, {**content, "fingerprint": fingerprint.digest, "parts": fingerprint.parts})


def read_mark(url: str) -> dict[str, Any] | None:
    """The mark at `url`, or None where there is none.

    A file that is no JSON object with a fingerprint counts as none: no mark of ours is ever half-written, and
    work without a mark is simply done again.
    """
    try:
        mark = storage.read_json(url)
    except (FileNotFoundError, ValueError):
        return None
    return mark if isinstance(mark, dict) and "fingerprint" in mark else None


def read_committed(url: str, mark_url: str, checksum: str) -> bytes:
    """The whole file at `url`, for which the mark at `mark_url` vouches.

    Raises `InputError` where it is missing or has another checksum. The mark is removed then, so that the work counts
    as not done.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        found = "missing, though its commit mark is there"
    else:
        if storage.checksum(data) == checksum:
            return data
        found = f"changed since it was committed: its checksum is not {checksum}"
    storage.remove(mark_url)
    raise InputError(f"{url}: {found}; the mark is removed now, so the same command makes the file anew")


def is_current(url: str, mark: dict[str, Any] | None, fingerprint: Fingerprint, stale: str) -> bool:
    """Whether `mark`, read from `url`, says that the work with this fingerprint is complete.

    For a mark with another fingerprint the answer is False with `stale="redo"`; with `stale="refuse"` it is a
    `FingerprintError` that names the differing values.
    """
    if mark is None:
        return False
    if mark["fingerprint"] == fingerprint.digest:
        return True
    if stale == "redo":
        return False
    found = mark.get("parts")
    differences = fingerprint.differences(found) if isinstance(found, dict) and found else []
    named = name_differences(differences) or "its values are not recorded"
    raise FingerprintError(
        f"{url} was made with other settings ({named}): expected the same ones; use another run folder, or "
        "engine.stale=redo to replace it"
    )


def invalidate(url: str, fingerprint: Fingerprint) -> None:
    """Before the files under a mark are replaced: remove the mark if it has another fingerprint.

    Otherwise a crash in between would leave new files under a mark that vouches for the old ones. An equal mark
    stays: a second writer of the same work writes the same bytes, or, on another kind of GPU, a file that
    `read_committed` tells from the one that the mark is of.
    """
    mark = read_mark(url)
    if mark is not None and mark["fingerprint"] != fingerprint.digest:
        storage.remove(url)
