"""Which kept pair goes to which pruned tar, and the kept samples of the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipeline.emit.members import Sample, read_samples
from pipeline.emit.permutation import Permutation
from pipeline.errors import InputError
from pipeline.store import storage


@dataclass(frozen=True)
class Input:
    """An input shard with kept pairs.

    Attributes:
        number: of the shard in the run, from 0.
        name: its file name.
        url: where it is.
        keep: its keep list.
        kept: rows of that.
        places: what the inventory keeps of where its members lie, if anything (`pipeline.data.places`).
    """

    number: int
    name: str
    url: str
    keep: str
    kept: int
    places: str


@dataclass(frozen=True)
class Plan:
    """Which kept pair goes to which place of which pruned tar.

    Attributes:
        folder: where the tars go.
        inputs: input shards with kept pairs, in order.
        pairs_per_shard: at most so many pairs in a tar.
        seed: of the global shuffle; None keeps the order of the inputs.
        suffix_keys: whether each key gets the number of its input shard, because keys repeat over the input.
        fingerprint: digest of all that decides the bytes.
        caption: where the captions are that become `txt` members: `txt` itself, or `json:KEY`.
    """

    folder: str
    inputs: tuple[Input, ...]
    pairs_per_shard: int
    seed: int | None
    suffix_keys: bool
    fingerprint: str
    caption: str = "txt"

    @property
    def copies_members(self) -> bool:
        """Whether each member of a kept pair goes into the tars as it is."""
        return self.caption == "txt"

    @property
    def pairs(self) -> int:
        """Kept pairs in all."""
        return sum(item.kept for item in self.inputs)

    @property
    def shards(self) -> int:
        """Number of pruned tars."""
        return -(-self.pairs // self.pairs_per_shard)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First place of a tar and of the next: sizes differ by at most one pair."""
        return shard * self.pairs // self.shards, (shard + 1) * self.pairs // self.shards

    def tar(self, shard: int) -> str:
        """A pruned tar."""
        return storage.join(self.folder, f"{shard:05d}.tar")

    def sources(self, shard: int) -> str:
        """Where the pairs of a tar come from (Parquet, `SOURCE_SCHEMA`, in the tar's order)."""
        return storage.join(self.folder, f"{shard:05d}.parquet")

    def stats(self, shard: int) -> str:
        """The commit mark of a tar (JSON), written last."""
        return storage.join(self.folder, f"{shard:05d}_stats.json")

    @property
    def sizes(self) -> str:
        """Pairs of each tar (JSON), for open_clip."""
        return storage.join(self.folder, "sizes.json")

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Number, among all kept pairs, of the first one of each input; int64 `[inputs + 1]`, the total last."""
        return np.concatenate([[0], np.cumsum([item.kept for item in self.inputs], dtype=np.int64)])

    @property
    def permutation(self) -> Permutation:
        """Where the shuffle puts each kept pair."""
        if self.seed is None:
            raise ValueError("a plan without a seed keeps the order of the inputs")
        return Permutation(self.pairs, self.seed)

    def suffix(self, source: Input) -> str:
        """What follows a pair's own key in its pruned tar: its input's number if keys repeat."""
        return f"-{source.number:05d}" if self.suffix_keys else ""

    @property
    def parts(self) -> str:
        """Folder of what a shuffle prepares per input shard; removed at the end."""
        return storage.join(self.folder, f"{storage.TEMPORARY_PREFIX}parts-{self.fingerprint}")


@dataclass(slots=True, frozen=True)
class KeptRow:
    """A row of a keep list, and the input shard it belongs to."""

    source: Input
    uid: str
    key: str
    index: int


@dataclass(slots=True, frozen=True)
class KeptColumns:
    """Rows of one input shard's keep list, column by column."""

    source: Input
    uids: list[str]
    keys: list[str]
    indices: list[int]

    def rows(self) -> list[KeptRow]:
        """The same, row by row."""
        columns = zip(self.uids, self.keys, self.indices, strict=True)
        return [KeptRow(self.source, uid, key, index) for uid, key, index in columns]


def read_keep(source: Input, first: int = 0, last: int | None = None) -> KeptColumns:
    """Rows `first` to `last` of an input shard's keep list."""
    with storage.open_read(source.keep) as handle:
        table = pq.ParquetFile(handle).read(columns=["uid", "key", "index"], use_threads=False)
    table = table.slice(first, None if last is None else last - first)
    return KeptColumns(source, *(table[name].to_pylist() for name in ("uid", "key", "index")))


def kept_samples(rows: Sequence[KeptRow]) -> Iterator[tuple[KeptRow, Sample]]:
    """The samples of rows of one input shard, in order.

    Raises `InputError` when the shard holds other samples than the keep list says.
    """
    if not rows:
        return
    samples = read_samples(rows[0].source.url, [row.index for row in rows])
    for row, sample in zip(rows, samples, strict=True):
        check_key(row, sample)
        yield row, sample


def check_key(row: KeptRow, sample: Sample) -> None:
    """Raise `InputError` unless the sample has the key that the keep list says."""
    if sample.key != row.key and printable(sample.key) != row.key:
        raise changed(row.source, row.index, row.key, printable(sample.key))


def changed(source: Input, index: int, expected: str, found: str) -> InputError:
    """The error for a shard that has another key at a place than its keep list."""
    return InputError(
        f"{source.url}: sample {index}: expected the key {expected!r} of {source.keep}, found {found!r}; the shard "
        "has changed since it was scored"
    )


def printable(name: str) -> str:
    """A member's name as the score files have it: bytes that are not UTF-8 are escaped with backslashes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
