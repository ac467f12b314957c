"""Checks what was handed over as pruned tars, and that it was made of the selection that is there now."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.inventory import ShardInfo
from pipeline.emit.emit import parse_mark, selection_digests
from pipeline.emit.manifest import SelectionFolder
from pipeline.emit.members import read_keys
from pipeline.emit.plan import printable
from pipeline.emit.reshard import ShardStats
from pipeline.emit.verify_selection import check_uids
from pipeline.errors import InputError
from pipeline.selection.summary import SelectionSummary
from pipeline.store import storage


def check_tars(
    folder: SelectionFolder, inventory: Sequence[ShardInfo], selection: SelectionSummary, mark: dict[str, Any]
) -> Iterator[str]:
    """Problems of a finished hand-over: stale against its selection, or tars that are not what their marks say."""
    try:
        summary = parse_mark(mark)
    except KeyError as error:
        yield f"{folder.mark}: expected the entry {error}, found none"
        return
    parts = mark.get("parts", {})
    for name, digest in selection_digests(inventory, selection).items():
        if parts.get(name) != digest:
            yield f"{folder.mark}: stale: made of another {name} than the one there now; run `diffprune emit`"
    yield from _check_script(folder, selection.kept)
    if not summary.tars:
        return
    sizes: dict[str, int] = {}
    for number in range(summary.tars):
        stem = storage.join(folder.shards, f"{number:05d}")
        successes = yield from _check_tar(stem, mark["fingerprint"])
        sizes[f"{number:05d}.tar"] = successes
    url = storage.join(folder.shards, "sizes.json")
    try:
        found = storage.read_json(url)
    except (FileNotFoundError, ValueError):
        yield f"{url}: missing or no JSON"
    else:
        if found != sizes:
            yield f"{url}: expected the pairs of each tar in {folder.shards}, found other numbers"
    if sum(sizes.values()) != selection.kept:
        yield f"{folder.shards}: expected {selection.kept} pairs, found {sum(sizes.values())}"
    known = {f"{number:05d}{end}" for number in range(summary.tars) for end in (".tar", ".parquet", "_stats.json")}
    for stranger in sorted({storage.basename(url) for url in storage.list_files(folder.shards)} - known):
        if stranger != "sizes.json":
            yield f"{storage.join(folder.shards, stranger)}: belongs to no pruned tar"
    sources = [storage.join(folder.shards, f"{number:05d}.parquet") for number in range(summary.tars)]
    if all(storage.exists(source) for source in sources):
        yield from check_uids(folder.uids, sources, "the pruned tars")


def _check_tar(stem: str, fingerprint: str) -> Generator[str, None, int]:
    """Problems of one tar and of the files beside it; returns the pairs that its mark speaks of."""
    tar, stats_url, sources_url = f"{stem}.tar", f"{stem}_stats.json", f"{stem}.parquet"
    try:
        stats = ShardStats(**storage.read_json(stats_url))
    except (FileNotFoundError, ValueError, TypeError) as error:
        yield f"{stats_url}: missing or not what was written: {error}"
        return 0
    if stats.fingerprint != fingerprint:
        yield f"{stats_url}: stale: expected the fingerprint {fingerprint} of the hand-over, found {stats.fingerprint}"
    try:
        with storage.open_read(sources_url) as handle:
            expected = pq.read_table(handle, columns=["key"])["key"].to_pylist()
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        yield f"{sources_url}: missing or unreadable: {error}"
        return stats.successes
    if len(expected) != stats.successes:
        yield f"{sources_url}: expected {stats.successes} rows, found {len(expected)}"
    try:
        size = storage.size(tar)
        found = [printable(key) for key in read_keys(tar)]
    except FileNotFoundError:
        yield f"{tar}: missing"
        return stats.successes
    except InputError as error:
        yield str(error)
        return stats.successes
    if size != stats.bytes:
        yield f"{tar}: truncated or changed: expected {stats.bytes} bytes, found {size}"
    if found != expected:
        place = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        yield f"{tar}: expected the {len(expected)} pairs of {sources_url}, found {len(found)}, others from {place} on"
    return stats.successes


def _check_script(folder: SelectionFolder, kept: int) -> Iterator[str]:
    try:
        text = storage.read_bytes(folder.train_script).decode()
    except FileNotFoundError:
        yield f"{folder.train_script}: missing"
        return
    match = re.search(r"--train-num-samples (\d+)", text)
    if match is None or int(match.group(1)) != kept:
        found = match.group(1) if match else "none"
        yield f"{folder.train_script}: expected --train-num-samples {kept}, found {found}"
