"""The global shuffle of a reshard in two rounds, so that no task reads more of the input than it writes.

Round one, per input shard: a list of its kept samples, sorted by where they go, that says where each lies. For a plain
local tar these are places in the tar itself; of any other shard the kept samples are written to a part, in the list's
order. Round two, per pruned tar: fetch its samples, which are neighbours in every list and in every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.layout import Int64, from_columns, to_columns
from pipeline.emit.blocks import Block, locate
from pipeline.emit.files import OpenFiles
from pipeline.emit.members import Sample, locate_samples, sample_in, too_few
from pipeline.emit.plan import KeptColumns, KeptRow, Plan, check_key, kept_samples, read_keep
from pipeline.emit.tar import Buffer, member
from pipeline.store import storage


def prepare(plan: Plan, number: int) -> None:
    """Write the list of an input shard's kept samples, and its part if it needs one.

    Holds the kept samples of one shard in memory where a part is written. Does nothing if the list is there.
    """
    if storage.exists(_list(plan, number)):
        return
    source = plan.inputs[number]
    kept = read_keep(source)
    start = int(plan.starts[number])
    places = plan.permutation.place(np.arange(start, start + source.kept))
    order = np.argsort(places)
    found = locate(kept, plan.suffix(source)) if plan.copies_members else None
    columns: dict[str, Any] = {"place": places[order]}
    if found is not None:
        columns |= to_columns(found.of(order))
    else:
        columns["begin"], columns["end"] = _spans(plan, number, kept, order)
    for name, values in (("uid", kept.uids), ("key", kept.keys), ("index", kept.indices)):
        columns[name] = pa.array(values).take(pa.array(order))
    table = pa.table(columns)
    with storage.atomic_writer(_list(plan, number)) as handle, pa.ipc.new_file(handle, table.schema) as writer:
        writer.write_table(table)


def _spans(plan: Plan, number: int, kept: KeptColumns, order: Int64) -> tuple[Int64, Int64]:
    """Where the kept samples of any shard begin and end, in `order`: in the shard, or in a part that is written."""
    spans = locate_samples(kept.source.url, kept.indices)
    if spans is not None:
        begins, ends = np.array(spans, np.int64)[order].T
        return begins, ends
    contents = [_plain_tar(sample) for _, sample in kept_samples(kept.rows())]
    ends = np.cumsum([len(contents[row]) for row in order])
    begins = ends - [len(contents[row]) for row in order]
    storage.write_bytes(_part(plan, number), b"".join(contents[row] for row in order))
    return begins, ends


def gather(plan: Plan, begin: int, end: int, files: OpenFiles) -> Iterator[Block | tuple[KeptRow, Sample]]:
    """The pairs at places `begin` to `end` of the shuffle, in its order.

    Of samples of plain local tars only the places are in memory; of the others, at most one pruned tar's worth, all.
    """
    numbers = plan.permutation.number(np.arange(begin, end))
    inputs = np.unique(np.searchsorted(plan.starts, numbers, side="right") - 1)
    tables = []
    for number in inputs:
        table = _open_list(_list(plan, int(number)))
        first, last = np.searchsorted(table["place"].to_numpy(), [begin, end])
        tables.append(table.slice(first, last - first))
    if all("sizes" in table.column_names for table in tables):
        yield _block(plan, inputs.tolist(), tables)
        return
    found: dict[int, _Fetched] = {}
    for number, table in zip(inputs, tables, strict=True):
        found.update(_fetch(plan, int(number), table))
    for place in range(begin, end):
        fetched = found.pop(place)
        sample = fetched.sample(files)
        check_key(fetched.row, sample)
        yield fetched.row, sample


@dataclass(slots=True, frozen=True)
class _Fetched:
    """A kept sample: the bytes of its members as they are in a plain tar, or where these lie in its input."""

    row: KeptRow
    content: Buffer | tuple[int, int]

    def sample(self, files: OpenFiles) -> Sample:
        content = self.content
        if isinstance(content, tuple):
            try:
                content = files.read(self.row.source.url, *content)
            except EOFError:
                raise too_few(self.row.source.url, self.row.index) from None
        return sample_in(content, self.row.index)


def _block(plan: Plan, inputs: list[int], tables: list[pa.Table]) -> Block:
    """The pairs of lists with layouts as one block, in order of their places."""
    counts = [table.num_rows for table in tables]
    merged = pa.concat_tables(tables)
    order = np.argsort(merged["place"].to_numpy())
    owner = np.repeat(np.arange(len(inputs)), counts)[order]
    taken = merged.select(["uid", "key", "index"]).take(pa.array(order))
    uids, keys, indices = (taken[name].to_pylist() for name in ("uid", "key", "index"))
    sources = [plan.inputs[number] for number in inputs]
    suffixes = [plan.suffix(source) for source in sources]
    return Block(sources, owner, uids, keys, suffixes, indices, from_columns(merged).of(order))


def clean_up(plan: Plan) -> None:
    """Remove lists and parts."""
    storage.remove_folder(plan.parts)


def _fetch(plan: Plan, number: int, table: pa.Table) -> Iterator[tuple[int, _Fetched]]:
    """The samples in rows of an input shard's list, with their places."""
    source = plan.inputs[number]
    columns = table.to_pydict()
    rows = [KeptRow(source, *row) for row in zip(columns["uid"], columns["key"], columns["index"], strict=True)]
    spans = (
        from_columns(table).spans() if "sizes" in columns else list(zip(columns["begin"], columns["end"], strict=True))
    )
    part = _part(plan, number)
    if storage.exists(part):
        fs, path = storage.filesystem(part)
        offset = spans[0][0]
        view = memoryview(fs.cat_file(path, start=offset, end=spans[-1][1]))
        contents = [view[start - offset : stop - offset] for start, stop in spans]
        yield from zip(columns["place"], map(_Fetched, rows, contents), strict=True)
    else:
        yield from zip(columns["place"], map(_Fetched, rows, spans), strict=True)


def _open_list(url: str) -> pa.Table:
    if storage.is_local(url):
        return pa.ipc.open_file(pa.memory_map(storage.local_path(url))).read_all()
    return pa.ipc.open_file(pa.py_buffer(storage.read_bytes(url))).read_all()


def _plain_tar(sample: Sample) -> bytes:
    return b"".join(piece for ending, content in sample.members for piece in member(sample.key + ending, content))


def _list(plan: Plan, number: int) -> str:
    return storage.join(plan.parts, f"{number:05d}.arrow")


def _part(plan: Plan, number: int) -> str:
    return storage.join(plan.parts, f"{number:05d}.part")
