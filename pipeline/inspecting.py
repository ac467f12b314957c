"""A first look at shards before a run: how many pairs, how large, what is wrong with some, and what they look like."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipeline.config import MAX_PIXELS, DataConfig
from pipeline.data.decode import Decoder, ImageSpec
from pipeline.data.inventory import inspect_shard
from pipeline.data.reader import Sample, read_shard
from pipeline.data.shards import expand
from pipeline.data.stream import describe
from pipeline.errors import InputError
from pipeline.pictures import half_blocks, open_image
from pipeline.store import storage
from pipeline.text import count, percent, plain, plural, size

#: Samples of the first shard that are decoded.
DECODED = 2000
#: Shards whose samples are counted; the others are estimated from their sizes.
COUNTED = 8
READERS = 8
_CHUNK = 256
#: Images are decoded down to this, to find the broken ones.
_SPEC = ImageSpec((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Example:
    """A pair as it lies in the shard."""

    key: str
    uid: str
    caption: str
    image: bytes | None
    width: int
    height: int


@dataclass
class Inspection:
    """What was found in shards.

    Attributes:
        urls, sizes: the shards and their bytes.
        counts: samples of the shards that were counted, by place in `urls`.
        broken: where tars break off, by file name.
        looked_at: samples of the first shard that were decoded; the following attributes are about them.
        status: how many of them are `ok`, and how many have which problem.
        problems: one error message per problem.
        image_types, json_keys, sources: how often each occurs.
        widths, heights, caption_lengths: of the good ones.
        repeated: share of the captions that occur more than once.
        examples: good pairs, spread over those looked at.
    """

    urls: list[str]
    sizes: list[int]
    counts: dict[int, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    looked_at: int = 0
    status: Counter[str] = field(default_factory=Counter)
    problems: dict[str, str] = field(default_factory=dict)
    image_types: Counter[str] = field(default_factory=Counter)
    json_keys: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    caption_lengths: list[int] = field(default_factory=list)
    repeated: float = 0.0
    examples: list[Example] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every shard was counted."""
        return len(self.counts) == len(self.urls)

    @property
    def samples(self) -> int:
        """Samples in all shards, estimated from the sizes unless `exact`."""
        counted = sum(self.counts.values())
        weight = sum(self.sizes[place] for place in self.counts)
        return counted if self.exact else round(counted * sum(self.sizes) / max(weight, 1))


def inspect_shards(data: DataConfig, *, examples: int = 4) -> Inspection:
    """Look at the shards of a config: decode the start of the first one, count a few, take the sizes of all.

    Raises `ConfigError` when `data.shards` names nothing, `InputError` when storage fails.
    """
    urls = expand(data.shards)
    with ThreadPoolExecutor(READERS) as pool:
        found = Inspection(urls, [size for size, _ in pool.map(describe, urls)])
        places = sorted({round(place) for place in np.linspace(0, len(urls) - 1, min(COUNTED, len(urls)))})
        for info in pool.map(lambda place: inspect_shard(place, urls[place]), places):
            found.counts[info.index] = info.samples
            if info.end_error:
                found.broken[info.name] = info.end_error
    _look(found, data, examples)
    return found


def _look(found: Inspection, data: DataConfig, examples: int) -> None:
    decoder = Decoder(_SPEC, lambda texts: torch.zeros(len(texts), 1, dtype=torch.int64), data.max_pixels, data.source)
    captions: Counter[int] = Counter()
    expected = min(found.counts[0], DECODED)
    wanted = {round(place) for place in np.linspace(0, max(expected - 1, 0), examples)} if examples else set()
    with read_shard(found.urls[0], caption=data.caption) as reader:
        samples = islice(iter(reader), DECODED)
        while chunk := list(islice(samples, _CHUNK)):
            rows = decoder.decode_shard(chunk, threads=2).rows
            for sample, row in zip(chunk, rows, strict=True):
                found.looked_at += 1
                found.status[row.status] += 1
                found.json_keys.update((sample.meta or {}).keys())
                found.image_types[sample.image_type or "none"] += 1
                if row.status != "ok":
                    found.problems.setdefault(row.status, row.error)
                    continue
                found.sources[row.source] += 1
                found.widths.append(row.width)
                found.heights.append(row.height)
                found.caption_lengths.append(row.caption_length)
                captions[row.caption_id] += 1
                if any(place <= row.index for place in wanted):
                    wanted = {place for place in wanted if place > row.index}
                    found.examples.append(_example(sample, row.width, row.height))
    repeated = sum(times for times in captions.values() if times > 1)
    found.repeated = repeated / max(sum(captions.values()), 1)


def _example(sample: Sample, width: int, height: int) -> Example:
    return Example(sample.key, sample.uid, sample.caption or "", sample.image, width, height)


def print_inspection(found: Inspection, console: Console | None = None, *, max_pixels: int = MAX_PIXELS) -> None:
    """Print what was found: totals, the pairs looked at, problems by reason, and a few pairs with small pictures."""
    console = console or Console()
    facts = Table.grid(padding=(0, 2))
    about = "" if found.exact else f" (estimated from {len(found.counts)} counted shards)"
    for name, value in (
        ("shards", f"{count(len(found.urls))}, {size(sum(found.sizes))}"),
        ("pairs", f"{'' if found.exact else 'about '}{count(found.samples)}{about}"),
        ("looked at", f"{plural(found.looked_at, 'pair')} of {plain(storage.basename(found.urls[0]), 200)}"),
        ("images", _kinds(found) or "none"),
        ("width", f"{_range(found.widths)} pixels" if found.widths else ""),
        ("height", f"{_range(found.heights)} pixels" if found.heights else ""),
        (
            "captions",
            f"{_range(found.caption_lengths)} characters, {percent(found.repeated)} of them repeat"
            if found.caption_lengths
            else "",
        ),
        ("json keys", ", ".join(plain(key, 40) for key, _ in found.json_keys.most_common(12)) or "none"),
        ("sources", ", ".join(f"{plain(name, 40)} {times}" for name, times in _top(found.sources)) or "none"),
    ):
        if value:
            facts.add_row(Text(name, style="dim"), Text(value))
    console.print(facts)
    _print_problems(found, console)
    if found.examples:
        pictures = max_pixels if console.color_system else 0
        console.print(Columns([_picture(example, pictures) for example in found.examples], padding=(1, 3)))


def _print_problems(found: Inspection, console: Console) -> None:
    bad = found.looked_at - found.status["ok"]
    if not bad and not found.broken:
        if found.looked_at:
            console.print(Text("No problems found.", style="green"))
        return
    share = f": {plural(bad, 'pair')}, {percent(bad / found.looked_at)}" if bad else ""
    problems = Table(title=f"Problems{share}", title_justify="left")
    for head in ("reason", "pairs", "for example"):
        problems.add_column(head, justify="right" if head == "pairs" else "left")
    for reason, times in found.status.most_common():
        if reason != "ok":
            problems.add_row(Text(reason), count(times), Text(plain(found.problems.get(reason, ""), 120)))
    for name, error in found.broken.items():
        problems.add_row(Text("broken tar"), Text("\u2013"), Text(plain(f"{name}: {error}", 160)))
    console.print(problems)


def _kinds(found: Inspection) -> str:
    return ", ".join(f"{kind} {percent(times / found.looked_at)}" for kind, times in found.image_types.most_common())


def _top(counter: Counter[str]) -> list[tuple[str, int]]:
    return [(name, times) for name, times in counter.most_common(5) if name]


def _range(values: list[int]) -> str:
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{count(low)} to {count(high)} (median {count(middle)})" if low != high else count(low)


def _picture(example: Example, max_pixels: int) -> Group:
    """An example as a column of text; `max_pixels` 0 leaves the picture out, for output without colours."""
    image = open_image(example.image, max_pixels, 28) if example.image else None
    lines = [half_blocks(image, 28)] if image else []
    facts = Text(f"{plain(example.key, 28)}  {example.width} \u00d7 {example.height}", style="dim", overflow="fold")
    caption = Text(plain(example.caption, 112), overflow="fold")
    return Group(*lines, facts, *caption.wrap(Console(width=28), 28))


def first_problem(found: Inspection) -> InputError | None:
    """An error that says that no pair of the first shard can be used; None when one can."""
    if found.status["ok"]:
        return None
    reasons = ", ".join(f"{reason} {times}" for reason, times in found.status.most_common()) or "it has no samples"
    return InputError(f"{found.urls[0]}: no pair can be used: {reasons}")
