"""Committing the scores of a shard, and reading back what was committed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run import RunFolder
from pipeline.store import ahead, marks, storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import score_schema, serialise

if TYPE_CHECKING:
    import pyarrow.dataset


class Shard(Protocol):
    """What identifies an input shard (`pipeline.data.inventory.ShardInfo`)."""

    @property
    def index(self) -> int:
        """Number in the run, from 0."""
        ...

    @property
    def url(self) -> str:
        """Where it is."""
        ...

    @property
    def name(self) -> str:
        """File name."""
        ...

    @property
    def bytes(self) -> int:
        """Size on storage."""
        ...

    @property
    def etag(self) -> str:
        """Etag or time of change."""
        ...


@dataclass(frozen=True)
class ShardCounts:
    """What came of a shard: rows in all, and how many of each status (`ok` among them)."""

    rows: int
    by_status: dict[str, int]

    @property
    def ok(self) -> int:
        """Pairs with a score."""
        return self.by_status.get("ok", 0)

    @property
    def rejected(self) -> dict[str, int]:
        """Pairs without a score, by reason."""
        return {status: count for status, count in self.by_status.items() if status != "ok"}

    @staticmethod
    def of(table: pa.Table) -> ShardCounts:
        """Count the rows of a score table."""
        counted = table["status"].combine_chunks().value_counts().to_pylist()
        return ShardCounts(table.num_rows, {str(entry["values"]): int(entry["counts"]) for entry in counted})


@dataclass(frozen=True)
class ScoreMark:
    """The content of `scores/NNNNN.json`.

    `seconds` has the time of each phase, `end_error` says where a broken tar ended (empty for a whole one),
    `finished` is Unix time. The times are the only values that differ between two runs with one fingerprint.
    """

    shard: int
    url: str
    rows: int
    ok: int
    reasons: dict[str, int]
    end_error: str
    bytes: int
    checksum: str
    seconds: dict[str, float]
    finished: float
    worker: str
    fingerprint: str
    parts: dict[str, Any] = field(repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decided the scores but for the shard: the same for all marks of a run."""
        return {name: value for name, value in self.parts.items() if name != "shard"}

    @property
    def statuses(self) -> dict[str, int]:
        """Rows by status."""
        return {"ok": self.ok, **self.reasons}

    @staticmethod
    def parse(value: dict[str, Any]) -> ScoreMark:
        """A mark as read from JSON. Raises `KeyError` when something is missing (a mark of another version)."""
        return ScoreMark(**{name: value[name] for name in ScoreMark.__dataclass_fields__})


def shard_fingerprint(fingerprint: Fingerprint, shard: Shard) -> Fingerprint:
    """The run's fingerprint with the identity of one input shard added."""
    return fingerprint.of_shard(shard.name, shard.bytes, shard.etag)


def commit_scores(
    run: RunFolder,
    shard: Shard,
    table: pa.Table,
    fingerprint: Fingerprint,
    *,
    estimator: str,
    seconds: dict[str, float],
    finished: float,
    worker: str = "",
    end_error: str = "",
) -> ScoreMark:
    """Write a shard's score file, then its mark. `fingerprint` is the run's; the shard's identity is added here.

    `seconds` has those of each phase; `finished` is Unix time in seconds; `worker` says who scored the shard, so that
    workers can be counted. A crash at any point leaves either no mark, or a mark whose file is whole.
    """
    mine = shard_fingerprint(fingerprint, shard)
    data = serialise(table, estimator=estimator, fingerprint=mine.digest)
    counts = ShardCounts.of(table)
    url = run.score_mark(shard.index)
    marks.invalidate(url, mine)
    storage.write_bytes(run.score_file(shard.index), data)
    mark = ScoreMark(
        shard=shard.index,
        url=shard.url,
        rows=counts.rows,
        ok=counts.ok,
        reasons=dict(sorted(counts.rejected.items())),
        end_error=end_error,
        bytes=len(data),
        checksum=storage.checksum(data),
        seconds={phase: round(value, 4) for phase, value in seconds.items()},
        finished=round(finished, 3),
        worker=worker,
        fingerprint=mine.digest,
        parts=mine.parts,
    )
    content = asdict(mark)
    del content["fingerprint"], content["parts"]
    marks.write_mark(url, mine, content)
    return mark


def read_marks(run: RunFolder) -> Iterator[ScoreMark]:
    """The commit marks of a run whose score file is there, by shard number; bounded memory.

    Left out are marks of another version of the format, whose shards are scored again, and those of shards that are
    not, or not like this, in the run's inventory.
    """
    known = _inventory(run)
    files = storage.list_files(run.scores)
    scored = {url.removesuffix(".parquet") for url in files if url.endswith(".parquet")}
    urls = [url for url in files if url.endswith(".json") and url.removesuffix(".json") in scored]
    del files, scored
    for mark in ahead.in_order(marks.read_mark, urls):
        if mark is not None and ScoreMark.__dataclass_fields__.keys() <= mark.keys():
            found = ScoreMark.parse(mark)
            if known is None or known.get(found.shard) == _identity(found.parts.get("shard", {})):
                yield found


def _inventory(run: RunFolder) -> dict[int, int] | None:
    """Identity of each shard of the inventory by its number; None where there is no inventory."""
    if not storage.exists(run.inventory):
        return None
    with storage.open_read(run.inventory) as handle:
        table = pq.read_table(handle, columns=["index", "name", "bytes", "etag"])
    return {row.pop("index"): _identity(row) for batch in table.to_batches(1024) for row in batch.to_pylist()}


def _identity(shard: dict[str, Any]) -> int:
    return hash((shard.get("name"), shard.get("bytes"), shard.get("etag")))


def committed(run: RunFolder, shards: Sequence[Shard], fingerprint: Fingerprint, stale: str) -> Iterator[ScoreMark]:
    """The marks of those of `shards` that are complete with this fingerprint (the run's, without a shard).

    A mark with another fingerprint is left out with `stale="redo"` and a `FingerprintError` with `"refuse"`.
    """
    return (mark for mark, current in judged(run, shards, fingerprint, stale) if current)


def judged(
    run: RunFolder, shards: Sequence[Shard], fingerprint: Fingerprint, stale: str
) -> Iterator[tuple[ScoreMark, bool]]:
    """The marks of `shards`, each with whether it has this fingerprint (the run's, without a shard).

    A mark that has another one is a `FingerprintError` with `stale="refuse"`.
    """
    by_index = {shard.index: place for place, shard in enumerate(shards)}
    for mark in read_marks(run):
        place = by_index.get(mark.shard)
        if place is None:
            continue
        mine = shard_fingerprint(fingerprint, shards[place])
        yield mark, marks.is_current(run.score_mark(mark.shard), asdict(mark), mine, stale)


def remove_strangers(run: RunFolder, shards: int) -> None:
    """Remove scores of an input that had more shards than these, whose numbers are 0 to `shards` - 1."""
    for ending in (".json", ".parquet"):  # first what vouches for the file
        numbers = {url: storage.basename(url).removesuffix(ending) for url in storage.list_files(run.scores, ending)}
        ahead.each(
            storage.remove, [url for url, number in numbers.items() if number.isdigit() and int(number) >= shards]
        )


def withdraw(run: RunFolder, shards: Sequence[int]) -> None:
    """Remove the marks of these shards (numbers): nothing vouches for their scores any more."""
    ahead.each(storage.remove, [run.score_mark(shard) for shard in shards])


def open_scores(run: RunFolder) -> pyarrow.dataset.Dataset:
    """All committed scores as one Arrow dataset, by shard number; files without a mark are not part of it."""
    import pyarrow.dataset  # with it comes pandas, which workers can do without

    files = [run.score_file(mark.shard) for mark in read_marks(run)]
    if not files:
        return pyarrow.dataset.dataset(score_schema().empty_table())
    fs, _ = storage.filesystem(run.scores)
    paths = [storage.filesystem(file)[1] for file in files]
    return pyarrow.dataset.dataset(paths, format="parquet", filesystem=fs)
