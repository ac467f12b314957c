"""Writes the kept pairs as new tars, one independent, repeatable task per tar.

What a tar contains depends on the inputs, the keep lists and the settings alone, never on who writes it or when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.emit import shuffle
from pipeline.emit.blocks import Block, read_block
from pipeline.emit.captions import with_caption
from pipeline.emit.files import OpenFiles, large_file
from pipeline.emit.members import Sample
from pipeline.emit.plan import Input, KeptRow, Plan, kept_samples, printable, read_keep
from pipeline.emit.tar import TarWriter, json_of
from pipeline.selection.tasks import MapTasks
from pipeline.store import ahead, storage

#: Raised whenever the same inputs would give other bytes.
FORMAT = 1

#: Columns of `NNNNN.parquet`: one row per pair of the tar beside it, in its order.
SOURCE_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("source_url", pa.string()),
        ("source_key", pa.string()),
        ("source_index", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ShardStats:
    """The content of `NNNNN_stats.json`.

    Attributes:
        successes: pairs in the tar (DataComp's name).
        bytes: size of the tar.
        json_added: pairs without a `json` member, which got one that holds their uid.
        json_without_uid: pairs whose own `json` holds no uid; their bytes stay as they are.
        fingerprint: that of the plan.
    """

    successes: int
    bytes: int
    json_added: int
    json_without_uid: int
    fingerprint: str


def reshard(plan: Plan, map_tasks: MapTasks = map) -> list[ShardStats]:
    """Write all tars of a plan; those that are already there with its fingerprint are left alone.

    Beside the tars: `NNNNN.parquet` (source of each pair), `NNNNN_stats.json` (last), and at the end `sizes.json`.
    Files of an earlier plan are removed.
    """
    _remove_strangers(plan)
    if plan.seed is not None:
        missing = any(stats is None for stats in ahead.in_order(partial(finished, plan), range(plan.shards)))
        if missing:
            storage.make_folder(plan.parts)
            for _ in map_tasks(partial(shuffle.prepare, plan), range(len(plan.inputs))):
                pass
    stats = list(map_tasks(partial(write_shard, plan), range(plan.shards)))
    sizes = {storage.basename(plan.tar(shard)): entry.successes for shard, entry in enumerate(stats)}
    storage.write_json(plan.sizes, sizes)
    if plan.seed is not None:
        shuffle.clean_up(plan)
    return stats


def write_shard(plan: Plan, shard: int) -> ShardStats:
    """Write one tar, then its sources, then its mark; nothing if they are there already.

    The mark of another tar of that number is removed before the tar is replaced.
    """
    done = finished(plan, shard)
    if done is not None:
        return done
    storage.remove(plan.stats(shard))
    begin, end = plan.bounds(shard)
    sources: dict[str, list[Any]] = {name: [] for name in SOURCE_SCHEMA.names}
    json_added = json_without_uid = 0
    with large_file(plan.tar(shard)) as path, open(path, "wb") as handle, OpenFiles() as files:
        writer = TarWriter(handle)
        for part in _in_order(plan, begin, end) if plan.seed is None else shuffle.gather(plan, begin, end, files):
            if isinstance(part, Block):
                owners, uids, source_keys, indices = part.sources, part.uids, part.keys, part.indices
                keys, has_json = part.targets, part.write(writer, files)
            else:
                row, sample = part
                key = sample.key + plan.suffix(row.source)
                owners, uids, source_keys, indices = [row.source], [row.uid], [row.key], [row.index]
                sample = with_caption(sample, plan.caption, row.source.url)
                keys, has_json = [printable(key)], [_add_sample(writer, key, sample, row.uid)]
            json_added += has_json.count(False)
            json_without_uid += sum(
                has and uid == _derived_uid(source, key)
                for has, uid, source, key in zip(has_json, uids, owners, source_keys, strict=True)
            )
            columns: list[list[Any]] = [uids, keys, [source.url for source in owners], source_keys, indices]
            for name, values in zip(sources, columns, strict=True):
                sources[name] += values
        writer.close()
        size = writer.position
    with storage.atomic_writer(plan.sources(shard)) as handle:
        pq.write_table(pa.table(sources, schema=SOURCE_SCHEMA), handle, compression="zstd")
    stats = ShardStats(end - begin, size, json_added, json_without_uid, plan.fingerprint)
    storage.write_json(plan.stats(shard), asdict(stats))
    return stats


def _in_order(plan: Plan, begin: int, end: int) -> Iterator[Block | tuple[KeptRow, Sample]]:
    """Kept pairs `begin` to `end` in the order of the inputs."""
    starts = plan.starts
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    for number in range(first, len(plan.inputs)):
        start = int(starts[number])
        if start >= end:
            return
        kept = read_keep(plan.inputs[number], max(0, begin - start), end - start)
        block = read_block(kept, plan.suffix(kept.source)) if plan.copies_members else None
        if block is None:
            yield from kept_samples(kept.rows())
        else:
            yield block


def _add_sample(writer: TarWriter, key: str, sample: Sample, uid: str) -> bool:
    """Append a sample; a json with the uid is added if there is none. Returns whether it had one."""
    has_json = False
    for ending, content in sample.members:
        writer.add(key + ending, content)
        has_json = has_json or ending.lower() == ".json"
    if not has_json:
        writer.add(*json_of(key, uid))
    return has_json


def finished(plan: Plan, shard: int) -> ShardStats | None:
    """The mark of a tar that is whole and has the plan's fingerprint."""
    try:
        stats = ShardStats(**storage.read_json(plan.stats(shard)))
        whole = storage.size(plan.tar(shard)) == stats.bytes and storage.exists(plan.sources(shard))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return stats if whole and stats.fingerprint == plan.fingerprint else None


def _remove_strangers(plan: Plan) -> None:
    """Remove `sizes.json` and the files of tars that the plan has not."""
    storage.remove(plan.sizes)
    mine = {
        storage.basename(url)
        for shard in range(plan.shards)
        for url in (plan.tar(shard), plan.sources(shard), plan.stats(shard))
    }
    others = [url for url in storage.list_files(plan.folder) if storage.basename(url) not in mine]
    ahead.each(storage.remove, others)


def _derived_uid(source: Input, key: str) -> str:
    """The uid that a pair without one of its own has."""
    return hashlib.blake2b(f"{source.name}/{key}".encode(), digest_size=16).hexdigest()
