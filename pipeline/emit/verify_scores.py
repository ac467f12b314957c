"""Checks score files against their commit marks, and both against the inventory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.inventory import ShardInfo
from pipeline.run import RunFolder
from pipeline.store import marks, storage
from pipeline.store.commits import ScoreMark, ShardCounts, read_marks
from pipeline.store.fingerprint import Fingerprint, name_differences


def check_scores(run: RunFolder, inventory: Sequence[ShardInfo]) -> Iterator[str]:
    """Problems of all score files; none before the first of them is there.

    Every shard of the inventory has a score file or a note that it was set aside, and all marks carry one
    fingerprint, apart from the shard's own part of it.
    """
    files = {storage.basename(url) for url in storage.list_files(run.scores)}
    if not files:
        return
    common: dict[str, Any] | None = None
    for info in inventory:
        file, mark_url = run.score_file(info.index), run.score_mark(info.index)
        files -= {storage.basename(file), storage.basename(mark_url)}
        value = marks.read_mark(mark_url)
        if value is None:
            if not storage.exists(run.failure_file(info.index)):
                yield f"{mark_url}: missing or unreadable: {info.url} has no finished scores"
            continue
        try:
            mark = ScoreMark.parse(value)
        except KeyError as error:
            yield f"{mark_url}: expected the entry {error}, found none"
            continue
        common = mark.settings if common is None else common
        yield from _check_fingerprint(mark_url, mark, info, common)
        yield from _check_counts(mark_url, mark, info)
        yield from _check_file(file, mark)
    for name in sorted(files):
        yield f"{storage.join(run.scores, name)}: belongs to no shard of the inventory"


def check_sample(run: RunFolder, inventory: Sequence[ShardInfo]) -> Iterator[str]:
    """Problems of amortised scores: of the sample's own files, where they are still there, and of the regressor; none
    of a sample that was given up for scoring every pair."""
    mark = marks.read_mark(run.regressor_mark)
    if mark is not None or not storage.list_files(run.scores, ".json"):
        yield from check_scores(RunFolder(run.sample), inventory)
    if mark is None:
        return
    if not storage.exists(run.regressor):
        yield f"{run.regressor}: missing, though its commit mark is there"
    elif storage.file_checksum(run.regressor) != mark.get("regressor"):
        yield f"{run.regressor}: changed since it was committed: its checksum is not {mark.get('regressor')}"
    for score in read_marks(run):
        if score.parts.get("regressor") not in (None, mark.get("regressor")):
            yield f"{run.score_mark(score.shard)}: stale: predicted with another regressor than {run.regressor}"


def _check_fingerprint(url: str, mark: ScoreMark, info: ShardInfo, common: dict[str, Any]) -> Iterator[str]:
    if Fingerprint(mark.parts).digest != mark.fingerprint:
        yield f"{url}: its fingerprint {mark.fingerprint} is not the one of the values recorded beside it"
    expected = Fingerprint(common).of_shard(info.name, info.bytes, info.etag)
    differences = expected.differences(mark.parts)
    if differences:
        yield f"{url}: stale: made with other settings or input than the rest: {name_differences(differences)}"


def _check_counts(url: str, mark: ScoreMark, info: ShardInfo) -> Iterator[str]:
    if mark.rows != info.samples:
        yield f"{url}: expected the {info.samples} samples of the inventory, found {mark.rows}"
    if mark.ok + sum(mark.reasons.values()) != mark.rows:
        yield f"{url}: expected ok and rejected pairs to add up to {mark.rows}, found {mark.ok} and {mark.reasons}"


def _check_file(url: str, mark: ScoreMark) -> Iterator[str]:
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        yield f"{url}: missing, though its commit mark is there"
        return
    if storage.checksum(data) != mark.checksum:
        yield (
            f"{url}: changed since it was committed: its checksum is not {mark.checksum}; without its mark "
            "`diffprune score` makes it anew"
        )
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["status", "index"])
    except (pa.ArrowException, OSError) as error:
        yield f"{url}: cannot be read: {error}"
        return
    counts = ShardCounts.of(table)
    if (counts.rows, counts.ok, counts.rejected) != (mark.rows, mark.ok, mark.reasons):
        yield (
            f"{url}: expected {mark.rows} rows with {mark.ok} ok and {mark.reasons} as in its mark, found "
            f"{counts.rows} with {counts.ok} ok and {counts.rejected}"
        )
    if table["index"].to_pylist() != list(range(counts.rows)):
        yield f"{url}: expected the rows in input order, indices 0 to {counts.rows - 1}"
    found = (table.schema.metadata or {}).get(b"fingerprint", b"").decode()
    if found != mark.fingerprint:
        yield f"{url}: expected the fingerprint {mark.fingerprint} of its mark, found {found or 'none'}"
