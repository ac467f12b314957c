"""Sorting the rows of any number of shards by bucket: runs that fit into memory, then pieces that are merged from them.

A piece holds whole buckets, consecutive ones of together about `PIECE_ROWS` rows, so that a bucket is read from one
file. Which one follows from the numbers of rows alone (`layout`).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Int64
from pipeline.selection import layers
from pipeline.store import storage

Rows = npt.NDArray[np.void]

#: Rows of a run (about 1 kB each with embeddings of 512 dimensions), and of a piece.
RUN_ROWS = PIECE_ROWS = 1 << 16


def layout(counts: Int64) -> tuple[Int64, Int64]:
    """The piece of each bucket and its first row there [buckets], by how many rows there are of each bucket."""
    before = np.cumsum(counts) - counts
    piece = before // PIECE_ROWS
    return piece, before - before[np.searchsorted(piece, piece)]


class Runs:
    """Rows that are put in with their buckets and come back as pieces; `counts` [buckets] says how many of each bucket.

    What exceeds one run goes to files, which are removed at the end: use it as a context manager.
    """

    def __init__(self, scratch: str, name: str, buckets: int) -> None:
        self.counts = np.zeros(buckets, dtype=np.int64)
        # A name of its own: a task that is tried again may still run elsewhere.
        self._folder = storage.join(scratch, f"{name}-runs", uuid.uuid4().hex)
        self._held: list[tuple[Rows, Int64]] = []
        self._filled = 0
        self._spilled = 0

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._spilled:
            storage.remove_folder(self._folder)

    def add(self, rows: Rows, bucket: Int64) -> None:
        """Put in rows [k] and their buckets [k]."""
        if self._held and self._filled + len(rows) > RUN_ROWS:
            self._spill()
        self._held.append((rows, bucket))
        self._filled += len(rows)
        self.counts += np.bincount(bucket, minlength=len(self.counts))

    def pieces(self) -> Iterator[tuple[int, Rows]]:
        """Number and rows of each piece that has some: by bucket, those of a bucket in the order they were put in."""
        if not self._held:
            return
        last = self._sorted()
        piece, _ = layout(self.counts)
        first = np.flatnonzero(np.diff(piece, prepend=-1))  # bucket of each piece
        edges = np.append(first, len(piece))
        buckets = (layers.read(self._folder, "buckets", run) for run in range(self._spilled))
        cuts = np.stack([np.searchsorted(bucket, edges) for bucket in (*buckets, last[1])], axis=1)
        for number, (begins, ends) in zip(piece[first].tolist(), pairwise(cuts.tolist()), strict=True):
            if begins != ends:
                yield number, self._merged(begins, ends, last)

    def _merged(self, begins: list[int], ends: list[int], last: tuple[Rows, Int64]) -> Rows:
        """Rows `begins` to `ends` of each run, by bucket."""
        spans = [span for span in enumerate(zip(begins, ends, strict=True)) if span[1][0] != span[1][1]]
        rows, bucket = (
            np.concatenate(
                [
                    layers.read_rows(self._folder, name, run, *span) if run < self._spilled else part[slice(*span)]
                    for run, span in spans
                ]
            )
            for name, part in zip(("rows", "buckets"), last, strict=True)
        )
        return rows[np.argsort(bucket, kind="stable")]

    def _sorted(self) -> tuple[Rows, Int64]:
        """What is held, by bucket; nothing is held afterwards."""
        rows, bucket = (np.concatenate([part[half] for part in self._held]) for half in (0, 1))
        self._held, self._filled = [], 0
        order = np.argsort(bucket, kind="stable")
        return rows[order], bucket[order]

    def _spill(self) -> None:
        rows, bucket = self._sorted()
        layers.write(self._folder, "rows", self._spilled, rows)
        layers.write(self._folder, "buckets", self._spilled, bucket)
        self._spilled += 1
