"""The last pass of a selection: its keep lists, and what is kept per shard and per source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.arrays import Bool, Int64
from pipeline.selection.plan import SelectionPlan
from pipeline.selection.recipe import Judged, OpenShard
from pipeline.selection.scan import ScoreShard, Span
from pipeline.selection.tasks import MapTasks, chunks
from pipeline.store import storage

KEEP_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("utility", pa.float32(), nullable=True),
    ]
)

#: Uids and utilities hardly get smaller, and would take most of the time.
_COMPRESSION = {"uid": "none", "key": "zstd", "index": "zstd", "utility": "none"}

#: Sources that are counted one by one; beyond, the smallest are summed up as `OTHER_SOURCES`.
MAX_SOURCES = 10_000
OTHER_SOURCES = "(others)"


@dataclass(frozen=True)
class ShardKept:
    """An input shard: its pairs, and how many of them are kept."""

    shard: int
    url: str
    rows: int
    kept: int


@dataclass
class Account:
    """What is kept where: per shard in order, (pairs, kept) per source, and where clusters were found [2, clusters]
    the pairs that can be kept and those that are."""

    shards: list[ShardKept] = field(default_factory=list)
    pairs: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    clusters: Int64 = field(default_factory=lambda: np.zeros((2, 0), np.int64))

    def add(self, other: Account) -> None:
        """Count what `other` has counted, too."""
        self.shards += other.shards
        self.pairs += other.pairs
        self.kept += other.kept
        self.clusters = self.clusters + other.clusters
        if len(self.pairs) > MAX_SOURCES:
            for source, _ in self.pairs.most_common()[MAX_SOURCES - 1 :]:
                if source != OTHER_SOURCES:
                    for counter in (self.pairs, self.kept):
                        counter[OTHER_SOURCES] += counter.pop(source, 0)


def carry_out(plan: SelectionPlan, folder: str | None, map_tasks: MapTasks) -> Account:
    """Count what a plan keeps per shard and source; with `folder`, write `keep/NNNNN.parquet` below it.

    A keep list has the kept pairs in input order; the same plan writes the same bytes. One is written for every
    shard, also where nothing of it is kept.
    """
    total = Account(clusters=_no_clusters(plan))
    results: Iterable[Account] = map_tasks(partial(_carry_out, plan, folder), chunks(plan.shards))
    for part in results:
        total.add(part)
    return total


def keep_name(shard: int) -> str:
    """The keep list of input shard number `shard`, relative to a selection's folder."""
    return f"keep/{shard:05d}.parquet"


def keep_file(folder: str, shard: int) -> str:
    """The keep list of input shard number `shard` in a selection's folder."""
    return storage.join(folder, keep_name(shard))


def _carry_out(plan: SelectionPlan, folder: str | None, shards: Sequence[ScoreShard]) -> Account:
    account = Account(clusters=_no_clusters(plan))
    for shard in shards:
        with OpenShard(plan.recipe, shard) as opened:
            columns = ["uid", "key", "utility", "source"] if folder is not None else []
            kept = _kept(plan, opened, columns, account)
            if folder is None:
                count = sum(len(rows) for _, rows in kept)
            else:
                with storage.atomic_writer(keep_file(folder, shard.index)) as handle:
                    count = _write(handle, kept)
            account.shards.append(ShardKept(shard.index, shard.source, opened.file.rows, count))
    return account


def _kept(plan: SelectionPlan, opened: OpenShard, columns: list[str], account: Account) -> Iterator[tuple[Span, Int64]]:
    """Each span with the rows of it that are kept [k]."""
    for span in opened.spans():
        span.load(columns)
        judged = opened.judge(span)
        taken = taken_rows(plan, judged, opened.shard.index)
        rows = judged.places()[taken] - span.start
        if plan.recipe.clusters:
            cluster = opened.layer("cluster", span)
            for counts, places in zip(account.clusters, (judged.places() - span.start, rows), strict=True):
                counts += np.bincount(cluster[places], minlength=len(counts))
        _count_sources(account.pairs, span.arrow("source"))
        _count_sources(account.kept, span.arrow("source").take(pa.array(rows)))
        yield span, rows


def _no_clusters(plan: SelectionPlan) -> Int64:
    return np.zeros((2, plan.recipe.clusters), np.int64)


def taken_rows(plan: SelectionPlan, judged: Judged, shard: int) -> Bool:
    """Which of the judged rows [k] the plan keeps."""
    taken = plan.end.takes(judged, shard)
    if plan.skip is not None:
        taken &= ~plan.skip.takes(judged, shard)
    return taken


def _write(handle: IO[bytes], kept: Iterable[tuple[Span, Int64]]) -> int:
    count = 0
    with pq.ParquetWriter(handle, KEEP_SCHEMA, compression=_COMPRESSION, use_dictionary=False) as writer:
        for span, rows in kept:
            places = pa.array(rows)
            # Score files have a row per sample, in input order: a row's number is its index.
            index = pa.array((rows + span.start).astype(np.int32))
            uid, key, utility = (
                span.arrow(name).cast(KEEP_SCHEMA.field(name).type).take(places) for name in ("uid", "key", "utility")
            )
            writer.write_table(pa.Table.from_arrays([uid, key, index, utility], schema=KEEP_SCHEMA))
            count += len(rows)
    return count


def _count_sources(counter: Counter[str], column: pa.Array) -> None:
    for entry in column.value_counts().to_pylist():
        counter[str(entry["values"] or "")] += int(entry["counts"])
