"""Checks a selection: keep lists against the scores, and manifest and uids against the keep lists."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.inventory import ShardInfo
from pipeline.emit.manifest import SelectionFolder, build_manifest, read_manifest
from pipeline.emit.uids import UID_DTYPE, Uids, read_uids, write_uids
from pipeline.errors import DiffpruneError
from pipeline.run import RunFolder
from pipeline.selection.scan import input_fingerprint
from pipeline.selection.summary import SelectionSummary
from pipeline.store import storage

#: Uids compared at a time.
BLOCK = 1 << 20

_COLUMNS = ["uid", "key", "index", "utility"]


def check_selection(run: RunFolder, inventory: Sequence[ShardInfo], selection: SelectionSummary) -> Iterator[str]:
    """Problems of a finished selection and of what was handed over of it, pruned tars apart."""
    folder = SelectionFolder(run.selection(selection.name))
    try:
        if input_fingerprint(run, selection.config["join"]) != selection.scores:
            yield f"{folder.root}: stale: selected from other scores than those there now; run `diffprune select`"
    except DiffpruneError as error:
        yield str(error)
    listed = {shard.shard: shard.kept for shard in selection.shards}
    for info in inventory:
        if info.index in listed:
            yield from _check_keep_list(folder.keep(info.index), run.score_file(info.index), listed[info.index])
    if sum(listed.values()) != selection.kept:
        yield f"{folder.root}: expected {selection.kept} kept pairs, found {sum(listed.values())} over the shards"
    mine = {folder.keep(index) for index in listed}
    there = storage.list_files(storage.join(folder.root, "keep"))
    for url in there:
        if url not in mine:
            yield f"{url}: belongs to no shard of the selection"
    if storage.exists(folder.mark):
        yield from _check_manifest(folder, inventory, selection)
        yield from check_uids(folder.uids, [url for url in there if url in mine], "the keep lists")
    elif storage.exists(folder.manifest):
        yield f"{folder.mark}: missing: the hand-over was begun and not finished; run `diffprune emit`"


def check_uids(url: str, uid_files: Iterable[str], source: str) -> Iterator[str]:
    """The first problem of a DataComp subset file that shall hold the uids of Parquet files, each once."""
    try:
        found = np.load(storage.local_path(url), mmap_mode="r") if storage.is_local(url) else _load_remote(url)
    except FileNotFoundError:
        yield f"{url}: missing"
        return
    except (ValueError, EOFError, OSError) as error:
        yield f"{url}: expected a numpy array: {error}"
        return
    if found.dtype != UID_DTYPE:
        yield f"{url}: expected dtype u8,u8, found {found.dtype}"
        return
    place = _unsorted(found)
    if place is not None:
        yield f"{url}: expected rising uids, each once: entries {place} and {place + 1} are not"
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "uids.npy")
        try:
            count = write_uids(path, read_uids(uid_files))
        except (DiffpruneError, pa.ArrowException, OSError) as error:
            yield f"{url}: cannot be compared with {source}: {error}"
            return
        if count != len(found):
            yield f"{url}: expected the {count} distinct uids of {source}, found {len(found)}"
            return
        expected = np.load(path, mmap_mode="r")
        for start in range(0, count, BLOCK):
            here, there = np.asarray(found[start : start + BLOCK]), np.asarray(expected[start : start + BLOCK])
            differ = np.flatnonzero(here != there)
            if len(differ):
                place = int(differ[0])
                yield (
                    f"{url}: entry {start + place}: expected {_text(there[place])} of {source}, found "
                    f"{_text(here[place])}"
                )
                return


def _check_keep_list(url: str, score_url: str, kept: int) -> Iterator[str]:
    try:
        with storage.open_read(url) as handle:
            keep = pq.read_table(handle, columns=_COLUMNS)
    except FileNotFoundError:
        yield f"{url}: missing"
        return
    except (pa.ArrowException, OSError) as error:
        yield f"{url}: cannot be read: {error}"
        return
    if keep.num_rows != kept:
        yield f"{url}: expected the {kept} rows of the selection, found {keep.num_rows}"
    index = keep["index"].to_numpy()
    if (np.diff(index) <= 0).any():
        yield f"{url}: expected ascending indices, each once"
    try:
        with storage.open_read(score_url) as handle:
            scores = pq.read_table(handle, columns=[*_COLUMNS, "status"])
    except (FileNotFoundError, pa.ArrowException, OSError):
        # Said of the score file already.
        return
    inside = (index >= 0) & (index < scores.num_rows)
    if not inside.all():
        yield f"{url}: expected indices below {scores.num_rows}, found {int(index[~inside][0])}"
        return
    rows = scores.take(pa.array(index))
    for name in _COLUMNS:
        same = pc.fill_null(pc.equal(rows[name], keep[name].cast(rows[name].type)), False).to_numpy()
        if not same.all():
            row = int(np.flatnonzero(~same)[0])
            yield (
                f"{url}: row {row}: expected the {name} {rows[name][row].as_py()!r} of sample {index[row]} in "
                f"{score_url}, found {keep[name][row].as_py()!r}"
            )
    rejected = pc.not_equal(rows["status"], "ok").to_numpy()
    if rejected.any():
        row = int(np.flatnonzero(rejected)[0])
        yield f"{url}: row {row}: a pair that was rejected ({rows['status'][row]}) is kept"


def _check_manifest(
    folder: SelectionFolder, inventory: Sequence[ShardInfo], selection: SelectionSummary
) -> Iterator[str]:
    try:
        found = read_manifest(folder.manifest)
    except FileNotFoundError:
        yield f"{folder.manifest}: missing"
        return
    except (ValueError, TypeError) as error:
        yield f"{folder.manifest}: expected one JSON object per input shard: {error}"
        return
    expected = build_manifest(inventory, selection)
    if len(found) != len(expected):
        yield f"{folder.manifest}: expected {len(expected)} lines, one per input shard, found {len(found)}"
    for number, (line, right) in enumerate(zip(found, expected, strict=False), start=1):
        if line != right:
            yield f"{folder.manifest}: line {number}: expected {right}, found {line}"


def _unsorted(uids: Uids) -> int | None:
    """The first entry that is not below the next one."""
    for start in range(0, len(uids) - 1, BLOCK):
        block = np.asarray(uids[start : start + BLOCK + 1])
        high, low = block["f0"], block["f1"]
        rising = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
        if not rising.all():
            return start + int(np.flatnonzero(~rising)[0])
    return None


def _load_remote(url: str) -> Uids:
    with storage.open_read(url) as handle:
        array: Uids = np.load(handle)
    return array


def _text(uid: np.void) -> str:
    return f"{int(uid['f0']):016x}{int(uid['f1']):016x}"
