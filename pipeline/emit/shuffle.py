"""The global shuffle of a reshard in two rounds, so that no task reads more of the input than it writes.

Round one, per input shard: a list of its kept samples, sorted by where they go, that says where each lies. For a plain
local tar these are places in the tar itself; of any other shard the kept samples are written to a part, in the list's
order. Round two, per pruned tar: fetch its samples, which are neighbours in every list and in every part.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.emit.members import Sample, locate_samples, map_file, sample_in
from pipeline.emit.plan import KeptRow, Plan, check_key, kept_samples, read_keep
from pipeline.emit.tar import Buffer, member
from pipeline.store import storage


def prepare(plan: Plan, number: int) -> None:
    """Write the list of an input shard's kept samples, and its part if it needs one.

    Holds the kept samples of one shard in memory where a part is written. Does nothing if the list is there.
    """
    if storage.exists(_list(plan, number)):
        return
    source = plan.inputs[number]
    rows = read_keep(source).rows()
    start = int(plan.starts[number])
    places = plan.permutation.place(np.arange(start, start + source.kept))
    order = np.argsort(places)
    spans = locate_samples(source.url, [row.index for row in rows])
    if spans is None:
        contents = [_plain_tar(sample) for _, sample in kept_samples(rows)]
        ends = np.cumsum([len(contents[row]) for row in order])
        begins = ends - [len(contents[row]) for row in order]
        storage.write_bytes(_part(plan, number), b"".join(contents[row] for row in order))
    else:
        begins, ends = np.array(spans, np.int64)[order].T
    sorted_rows = [rows[row] for row in order]
    table = pa.table(
        {
            "place": places[order],
            "begin": begins,
            "end": ends,
            "uid": [row.uid for row in sorted_rows],
            "key": [row.key for row in sorted_rows],
            "index": [row.index for row in sorted_rows],
        }
    )
    with storage.atomic_writer(_list(plan, number)) as handle, pa.ipc.new_file(handle, table.schema) as writer:
        writer.write_table(table)


def gather(plan: Plan, begin: int, end: int) -> Iterator[tuple[KeptRow, Sample]]:
    """The pairs at places `begin` to `end` of the shuffle, in its order.

    Samples of plain local tars stay in the mapped files; the others, at most one pruned tar's worth, are in memory.
    """
    numbers = plan.permutation.number(np.arange(begin, end))
    sources = np.unique(np.searchsorted(plan.starts, numbers, side="right") - 1)
    found: dict[int, tuple[KeptRow, Buffer]] = {}
    for number in sources:
        found.update(_fetch(plan, int(number), begin, end))
    for place in range(begin, end):
        row, content = found.pop(place)
        sample = sample_in(content, row.index)
        check_key(row, sample)
        yield row, sample


def clean_up(plan: Plan) -> None:
    """Remove lists and parts."""
    fs, path = storage.filesystem(plan.parts)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _fetch(plan: Plan, number: int, begin: int, end: int) -> Iterator[tuple[int, tuple[KeptRow, Buffer]]]:
    """The samples of an input shard that go to places `begin` to `end`, with these, as bytes of a plain tar."""
    source = plan.inputs[number]
    table = _open_list(_list(plan, number))
    first, last = np.searchsorted(table["place"].to_numpy(), [begin, end])
    columns = table.slice(first, last - first).to_pydict()
    part = _part(plan, number)
    if storage.exists(part):
        fs, path = storage.filesystem(part)
        offset = columns["begin"][0]
        view = memoryview(fs.cat_file(path, start=offset, end=columns["end"][-1]))
    else:
        offset, view = 0, map_file(source.url)
    for place, start, stop, uid, key, index in zip(*columns.values(), strict=True):
        yield place, (KeptRow(source, uid, key, index), view[start - offset : stop - offset])


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
