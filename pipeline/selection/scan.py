"""Reading score files in spans of bounded size, column by column, as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.arrays import Bool, UInt64
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection.keys import parse_uids
from pipeline.store import storage
from pipeline.store.commits import read_marks
from pipeline.store.fingerprint import Fingerprint

#: Rows that are looked at together: the unit of memory of every pass.
SPAN_ROWS = 1 << 18

#: Columns of few distinct strings, read as dictionaries: several times faster.
REPEATING = ["status", "source"]


@dataclass(frozen=True)
class ScoreShard:
    """A committed score file. `index` is its input shard's number, `source` that shard's URL."""

    index: int
    url: str
    source: str
    rows: int


def committed_shards(run: RunFolder) -> tuple[list[ScoreShard], str]:
    """The committed score files of a run in the order of their input shards, and one fingerprint of them all.

    Raises `StageError` where there are none, or those of different settings.
    """
    found: list[tuple[ScoreShard, str]] = []
    settings: dict[str, str] = {}
    for mark in read_marks(run):
        shard = ScoreShard(mark.shard, run.score_file(mark.shard), mark.url, mark.rows)
        found.append((shard, f"{mark.shard} {mark.fingerprint} {mark.checksum}"))
        settings.setdefault(Fingerprint(mark.settings).digest, shard.url)
    if not found:
        raise StageError(f"{run.scores}: expected finished scores, found none; make them with `diffprune score`")
    if len(settings) > 1:
        first, second, *_ = settings.values()
        raise StageError(
            f"{run.scores}: expected scores of one setting, found {len(settings)} ({first} and {second} differ); "
            "finish them with `diffprune score`"
        )
    found.sort(key=lambda entry: entry[0].index)
    return [shard for shard, _ in found], storage.checksum("\n".join(line for _, line in found).encode())


def input_fingerprint(run: RunFolder, join: Mapping[str, str]) -> str:
    """One fingerprint of all scores that a selection of `run` with these joined runs is made from.

    Raises `StageError` where one of the runs has none.
    """
    return joined_fingerprint(committed_shards(run)[1], join)


def joined_fingerprint(own: str, join: Mapping[str, str]) -> str:
    """`input_fingerprint` of a run whose scores have the fingerprint `own` of `committed_shards`."""
    joined = [f"{name} {committed_shards(RunFolder(root))[1]}" for name, root in sorted(join.items())]
    return storage.checksum("\n".join([own, *joined]).encode()) if joined else own


class ScoreFile:
    """An open score file. Columns are read when they are asked for; use it as a context manager."""

    def __init__(self, url: str) -> None:
        self.url = url
        local = storage.is_local(url)
        self._handle = None if local else storage.open_read(url)
        self.parquet = pq.ParquetFile(
            storage.local_path(url) if local else self._handle, memory_map=local, read_dictionary=REPEATING
        )
        self.schema: pa.Schema = self.parquet.schema_arrow
        self.rows: int = self.parquet.metadata.num_rows

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.parquet.close()
        if self._handle is not None:
            self._handle.close()

    def spans(self, rows: int = SPAN_ROWS) -> Iterator[Span]:
        """Consecutive row groups of together about `rows` rows, in order; none for an empty file."""
        metadata = self.parquet.metadata
        groups: list[int] = []
        start = count = 0
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if groups and count + size > rows:
                yield Span(self, tuple(groups), start, count)
                start, groups, count = start + count, [], 0
            groups.append(group)
            count += size
        if count:
            yield Span(self, tuple(groups), start, count)


@dataclass
class Span:
    """Rows `start` to `start + rows` of a score file."""

    file: ScoreFile
    groups: tuple[int, ...]
    start: int
    rows: int
    _read: dict[str, pa.Array] = field(default_factory=dict)

    def load(self, names: Sequence[str]) -> None:
        """Read several columns in one go (they are read one by one otherwise)."""
        wanted = [name for name in names if name not in self._read]
        if wanted:
            table = self.file.parquet.read_row_groups(list(self.groups), columns=wanted, use_threads=False)
            for name in wanted:
                column = table[name]
                self._read[name] = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def arrow(self, name: str) -> pa.Array:
        """A column as an Arrow array [rows]."""
        self.load([name])
        return self._read[name]

    def numeric(self, name: str) -> npt.NDArray[Any]:
        """A numeric column [rows]: float32 where it is stored so, else float64; NaN where it is null."""
        column = self.arrow(name)
        kind = np.float32 if pa.types.is_float32(column.type) else np.float64
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=kind)

    def uids(self) -> tuple[UInt64, UInt64]:
        """High and low 64 bits of the uids [rows]."""
        return parse_uids(self.arrow("uid"), self.file.url)

    def ok(self) -> Bool | None:
        """Which rows have status `ok`; None where all have (known from the file's statistics, without reading)."""
        place = self.file.schema.get_field_index("status")  # nested columns have one leaf each, so numbers agree
        metadata = self.file.parquet.metadata
        statistics = (metadata.row_group(group).column(place).statistics for group in self.groups)
        if all(s is not None and s.has_min_max and s.min == s.max == "ok" and not s.null_count for s in statistics):
            return None
        column = self.arrow("status")
        is_ok = np.array([status == "ok" for status in column.dictionary.to_pylist()], dtype=bool)
        found: Bool = is_ok[column.indices.to_numpy(zero_copy_only=False)]
        return None if found.all() else found
