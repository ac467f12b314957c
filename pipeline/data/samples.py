"""Reads the samples at given positions of a shard, and as little else of it as possible. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.data.inventory import ShardInfo
from pipeline.data.layout import Layout
from pipeline.data.places import read_places
from pipeline.data.positions import Positions
from pipeline.data.reader import READ_TYPES, Group, Sample, SampleParser, most_bytes, read_shard
from pipeline.data.spans import Span, pays, read_spans
from pipeline.errors import InputError

#: By the number of a shard, where the places of its members are kept (`pipeline.data.places`).
Places = Callable[[int], str]


def samples_at(info: ShardInfo, indices: Positions, caption: str, places: Places | None = None) -> Iterator[Sample]:
    """The samples of a shard at `indices` (sorted, different), bad ones included.

    Where the inventory kept their places (found by `places`), what lies between them is not read; else the shard is
    read from its beginning up to the last. Raises `InputError` when the shard ends before that: it is not the one that
    was counted.
    """
    if not len(indices):
        return
    layout = read_places(places(info.index), info.url) if places is not None else None
    if layout is not None and len(layout) == info.samples:
        spans = layout.of(indices).spans()
        if pays(info.url, info.bytes, spans):
            yield from _samples_in(info, indices, caption, layout, spans)
            return
    yield from _samples_up_to(info, indices, caption)


def _samples_in(
    info: ShardInfo, indices: Positions, caption: str, layout: Layout, spans: Sequence[Span]
) -> Iterator[Sample]:
    parser, repeats = SampleParser(info.url, caption), layout.repeats()
    for index, (begin, _), content in zip(indices.tolist(), spans, read_spans(info.url, spans), strict=True):
        contents = {
            ending: None if end - start > most_bytes(ending) else bytes(content[start - begin : end - begin])
            for ending, start, end in layout.members(index)
            if ending in READ_TYPES
        }
        group = Group(layout.keys[index].decode(), bool(repeats[index]), contents)
        yield parser.parse(index, group)


def _samples_up_to(info: ShardInfo, indices: Positions, caption: str) -> Iterator[Sample]:
    wanted = iter(indices.tolist())
    next_one = next(wanted, None)
    with read_shard(info.url, caption=caption) as reader:
        for sample in reader:
            if sample.index == next_one:
                yield sample
                next_one = next(wanted, None)
                if next_one is None:
                    return
    raise InputError(f"{info.url}: has no sample {next_one}, the inventory counted {info.samples}; was it changed?")
