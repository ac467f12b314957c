"""Kept samples of plain local tars as arrays: their bytes go from the mapped inputs to the output many at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.emit.layout import Layout, find_layout
from pipeline.emit.members import Sample, is_mappable, map_file, too_few
from pipeline.emit.plan import Input, KeptColumns, changed
from pipeline.emit.tar import BLOCK, Buffer, TarWriter, headers, json_of, member


@dataclass(frozen=True)
class Block:
    """Kept samples `[k]` in the order in which they are written: rows of keep lists, layout, and mapped tars."""

    sources: list[Input]
    uids: list[str]
    keys: list[str]
    indices: list[int]
    layout: Layout
    views: list[memoryview]

    def write(self, writer: TarWriter) -> list[bool]:
        """Append the samples; a json with the uid is added where there is none. Returns which had one `[k]`.

        Contents are followed by the bytes that fill their last block in the input.
        """
        layout = self.layout
        made = headers(layout.names, layout.sizes).reshape(-1).data
        ends = layout.data + (layout.sizes + BLOCK - 1) // BLOCK * BLOCK
        places = list(zip(range(0, len(made), BLOCK), layout.data.tolist(), ends.tolist(), strict=True))
        sums = np.concatenate([[0], np.cumsum(ends - layout.data + BLOCK)])[layout.first]
        has_json: list[bool] = (np.add.reduceat(layout.json, layout.first[:-1]) > 0).tolist() if self.keys else []
        first = layout.first.tolist()
        rows = zip(self.views, first, first[1:], np.diff(sums).tolist(), has_json, strict=False)
        for number, (view, start, stop, size, has) in enumerate(rows):
            pieces: list[Buffer] = []
            for header, data, end in places[start:stop]:
                pieces += (made[header : header + BLOCK], view[data:end])
            if not has:
                added = member(*json_of(self.keys[number], self.uids[number]))
                pieces += added
                size += sum(map(len, added))
            writer.add_pieces(pieces, size)
        return has_json

    def samples(self) -> Iterator[Sample]:
        """The samples one by one."""
        layout = self.layout
        names = [bytes(name).rstrip(b"\0").decode() for name in layout.names]
        spans = list(zip(names, layout.data.tolist(), (layout.data + layout.sizes).tolist(), strict=True))
        first = layout.first.tolist()
        for key, index, view, start, stop in zip(self.keys, self.indices, self.views, first, first[1:], strict=False):
            yield Sample(index, key, [(name[len(key) :], view[data:end]) for name, data, end in spans[start:stop]])


def read_block(kept: KeptColumns) -> Block | None:
    """The kept samples of an input shard; None for other shards than usual plain local tars.

    Raises `InputError` when the shard holds other samples than the keep list says.
    """
    found = locate(kept)
    if found is None:
        return None
    layout, view = found
    count = len(kept.keys)
    return Block([kept.source] * count, kept.uids, kept.keys, kept.indices, layout, [view] * count)


def locate(kept: KeptColumns) -> tuple[Layout, memoryview] | None:
    """Where the kept samples of an input shard lie in it, as `read_block` finds them, and the mapped shard."""
    url = kept.source.url
    if not is_mappable(url):
        return None
    # One map for headers and contents: each new one costs the system a page table.
    view = map_file(url)
    layout = find_layout(view.obj)  # type: ignore[arg-type]
    if layout is None:
        return None
    missing = next((index for index in kept.indices if index >= len(layout)), None)
    if missing is not None:
        raise too_few(url, missing)
    found = layout.of(np.array(kept.indices, np.int64))
    keys = [key.decode() for key in found.keys.tolist()]
    for index, expected, key in zip(kept.indices, kept.keys, keys, strict=True):
        if key != expected:
            raise changed(kept.source, index, expected, key)
    return found, view
