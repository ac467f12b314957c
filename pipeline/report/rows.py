"""One shard's score rows as the report reads them: arrays, with which of the pairs were kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.inventory import ShardInfo
from pipeline.emit.manifest import SelectionFolder
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection.summary import begun_selections
from pipeline.store import storage
from pipeline.store.commits import read_marks

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: What the report reads of a score file.
COLUMNS = (
    "uid", "key", "index", "status", "error", "utility", "utility_std", "score", "terms", "predicted", "loss",
    "similarity", "width", "height", "caption_length", "source", "caption_id",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One row of the score files, for galleries and for `diffprune show`."""

    shard: int
    index: int
    uid: str
    key: str
    status: str
    error: str
    kept: bool
    utility: float
    utility_std: float
    score: float
    terms: tuple[float, ...]
    loss: float
    similarity: float
    width: int
    height: int
    caption_length: int
    source: str
    predicted: bool = False


class ShardRows:
    """The rows of one score file.

    Attributes:
        shard: number of the input shard.
        scored: bool `[n]`, the pair was scored and its utility is finite.
        kept: bool `[n]` per selection, in the order asked for.
        reasons: string `[n]`, why a pair was not scored; `not-finite` for a scored one without a finite utility.
    """

    def __init__(self, shard: int, table: pa.Table, kept_indices: list[NDArray[np.int64]]) -> None:
        self.shard = shard
        self.table = table
        status = table["status"].to_numpy()
        ok = status == "ok"
        self.scored: Bools = ok & np.isfinite(self.floats("utility"))
        self.reasons = np.where(ok & ~self.scored, "not-finite", status)
        index = table["index"].to_numpy()
        self.kept: list[Bools] = [np.isin(index, kept) for kept in kept_indices]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def floats(self, name: str) -> Floats:
        """A numeric column as float64 `[n]`; missing values are NaN."""
        values = self.table[name].to_numpy(zero_copy_only=False)
        return np.asarray(values, dtype=np.float64)

    def terms(self) -> Floats:
        """The terms of the scored pairs, float64 `[scored, m]`, NaN where one does not count; `[scored, 0]` where the
        file has none."""
        count = int(self.scored.sum())
        if not count:
            return np.empty((count, 0))
        lists = self.table["terms"].filter(pa.array(self.scored)).combine_chunks()
        flat = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
        return flat.reshape(count, -1) if len(flat) % count == 0 else np.empty((count, 0))

    def pair(self, row: int) -> Pair:
        """Row number `row` in full."""
        values = self.table.slice(row, 1).to_pylist()[0]

        def number(name: str) -> float:
            value = values[name]
            return float("nan") if value is None else float(value)

        return Pair(
            shard=self.shard,
            index=int(values["index"]),
            uid=values["uid"],
            key=values["key"],
            status=str(self.reasons[row]) if not self.scored[row] else "ok",
            error=values["error"],
            kept=bool(self.kept and self.kept[0][row]),
            utility=number("utility"),
            utility_std=number("utility_std"),
            score=number("score"),
            terms=tuple(float("nan") if term is None else float(term) for term in values["terms"] or ()),
            loss=number("loss"),
            similarity=number("similarity"),
            width=int(values["width"] or 0),
            height=int(values["height"] or 0),
            caption_length=int(values["caption_length"] or 0),
            source=values["source"] or "",
            predicted=values["predicted"],
        )


def selections(run: RunFolder) -> list[str]:
    """Names of the selections of a run that have keep lists; `default` first."""
    return [
        name
        for name in begun_selections(run)
        if storage.list_files(storage.join(run.selection(name), "keep"), ".parquet")
    ]


def kept_indices(run: RunFolder, selection: str, shard: int) -> NDArray[np.int64]:
    """Positions in the shard of the pairs that a selection keeps."""
    url = SelectionFolder(run.selection(selection)).keep(shard)
    if not storage.exists(url):
        return np.empty(0, dtype=np.int64)
    with storage.open_read(url) as handle:
        return np.asarray(pq.read_table(handle, columns=["index"])["index"].to_numpy(), dtype=np.int64)


def read_shard_rows(run: RunFolder, shard: int, names: list[str], columns: tuple[str, ...] = COLUMNS) -> ShardRows:
    """The rows of one shard with what each selection in `names` kept. Raises `FileNotFoundError`."""
    with storage.open_read(run.score_file(shard)) as handle:
        file = pq.ParquetFile(handle)
        table = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
    return ShardRows(shard, table, [kept_indices(run, name, shard) for name in names])


def scored_shards(run: RunFolder, shards: list[ShardInfo]) -> list[ShardInfo]:
    """The shards of the inventory whose scores are committed. Raises `StageError` when there is none."""
    committed = {mark.shard for mark in read_marks(run)}
    present = [info for info in shards if info.index in committed]
    if not present:
        raise StageError(f"{run.root}: no shard is scored yet: run `diffprune score CONFIG` first")
    return present


def iterate_rows(run: RunFolder, shards: list[ShardInfo], names: list[str]) -> Iterator[ShardRows]:
    """The rows of each shard in turn; one shard is in memory at a time."""
    for info in shards:
        yield read_shard_rows(run, info.index, names)
