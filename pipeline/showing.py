"""One pair of a finished run, explained: its image and caption, terms, rank, neighbours, and why it was kept or not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.data.inventory import ShardInfo, read_inventory
from pipeline.errors import InputError, StageError
from pipeline.pictures import half_blocks, open_image
from pipeline.report.contents import Content, fetch
from pipeline.report.recorded import checkpoint_names, data_config, optional_json
from pipeline.report.rows import Floats, Pair, read_shard_rows, scored_shards, selections
from pipeline.run import RunFolder
from pipeline.selection.summary import SelectionSummary, read_summary
from pipeline.store import storage
from pipeline.text import count, number, percent, plain, plus_minus

_PREFIX = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True)
class Neighbour:
    """A pair whose embedding is close.

    Attributes:
        image, text: cosine similarities of the image and the text embeddings.
    """

    uid: str
    image: float
    text: float
    utility: float
    caption: str


@dataclass
class Story:
    """What is known of one pair.

    Attributes:
        rank: 1 for the highest utility; 0 for a pair that was not scored.
        scored: scored pairs in the run.
        checkpoints: a name per term.
        verdicts: per selection, whether it keeps the pair and why.
        neighbours: the pairs nearest in image embedding, where the run stored embeddings.
    """

    pair: Pair
    rank: int
    scored: int
    checkpoints: list[str]
    verdicts: dict[str, str]
    content: Content | None
    max_pixels: int
    neighbours: list[Neighbour] = field(default_factory=list)


def tell(root: str, uid: str, *, neighbours: int = 5) -> Story:
    """Find a pair by its uid, or by a beginning of it that no other pair has, and bring together what is known.

    Reads the scores of the run column by column; memory does not grow with the number of pairs.
    Raises `InputError` for a uid that is not there, `StageError` for a run without scores.
    """
    run = RunFolder(root)
    if not storage.exists(run.inventory):
        raise StageError(f"{root}: expected a run's folder, found no inventory there")
    inventory = read_inventory(run.inventory)
    shards = scored_shards(run, inventory)
    shard, row = _find(run, shards, uid)
    names = selections(run)
    rows = read_shard_rows(run, shard, names)
    pair = rows.pair(row)
    higher, scored = _rank(run, shards, pair.utility)
    data = data_config(run)
    verdicts = {name: _verdict(run, name, pair, bool(kept[row])) for name, kept in zip(names, rows.kept, strict=True)}
    near = _nearest(run, shards, shard, row, neighbours) if pair.status == "ok" else []
    places = {(pair.shard, pair.index), *(place for place, _ in near)}
    contents = fetch(places, inventory, data, run.places)
    story = Story(
        pair=pair,
        rank=higher + 1 if pair.status == "ok" else 0,
        scored=scored,
        checkpoints=checkpoint_names(optional_json(run.checkpoint_manifest), len(pair.terms)),
        verdicts=verdicts,
        content=contents.get((pair.shard, pair.index)),
        max_pixels=data.max_pixels,
    )
    for place, (image, text, near_uid, utility) in near:
        caption = contents[place].caption if place in contents else ""
        story.neighbours.append(Neighbour(near_uid, image, text, utility, caption))
    return story


def _find(run: RunFolder, shards: list[ShardInfo], uid: str) -> tuple[int, int]:
    wanted = uid.lower()
    if not _PREFIX.fullmatch(wanted):
        raise InputError(f"expected a uid of 32 hex digits, or at least its first 4, found {uid!r}")
    found: list[tuple[int, int, str]] = []
    for info, table in _columns(run, shards, ["uid"]):
        for row in np.flatnonzero(pc.starts_with(table["uid"], wanted).to_numpy()):
            found.append((info.index, int(row), table["uid"][int(row)].as_py()))
            if len({entry[2] for entry in found}) > 1:
                raise InputError(
                    f"{uid}: expected the beginning of one pair's uid, found {found[0][2]} and {found[-1][2]}"
                )
    if not found:
        raise InputError(f"{uid}: no pair of {run.root} has this uid")
    return found[0][:2]


def _columns(run: RunFolder, shards: list[ShardInfo], names: list[str]) -> Iterator[tuple[ShardInfo, pq.Table]]:
    for info in shards:
        with storage.open_read(run.score_file(info.index)) as handle:
            file = pq.ParquetFile(handle)
            yield info, file.read(columns=[name for name in names if name in file.schema_arrow.names])


def _rank(run: RunFolder, shards: list[ShardInfo], utility: float) -> tuple[int, int]:
    """Pairs with a higher utility, and scored pairs."""
    higher = scored = 0
    for _, table in _columns(run, shards, ["utility"]):
        values = table["utility"].to_numpy(zero_copy_only=False)
        higher += int((values > utility).sum())
        scored += int(np.isfinite(values).sum())
    return higher, scored


def _verdict(run: RunFolder, name: str, pair: Pair, kept: bool) -> str:
    if pair.status != "ok":
        return f"left out: it has no score ({pair.status})"
    try:
        summary = read_summary(run, name)
    except StageError:
        return "kept" if kept else "pruned"
    by = str(summary.config.get("by", "utility"))
    cut = f"{by} at or above {number(summary.threshold)}" if summary.threshold is not None else "its group's quota"
    if kept:
        return f"kept: {cut}"
    if by == "utility" and summary.threshold is not None and pair.utility < summary.threshold:
        return f"pruned: its utility {number(pair.utility)} is below the threshold {number(summary.threshold)}"
    return f"pruned: {_other_reasons(summary, pair)}"


def _other_reasons(summary: SelectionSummary, pair: Pair) -> str:
    """What may have pruned a pair that is not below a threshold of utility."""
    by, where = summary.config.get("by"), summary.config.get("where")
    reasons = [reason for reason, pairs in summary.pruned.items() if pairs]
    if reasons == ["quota"]:
        return _outranked(summary, pair)
    names = [f"where {where}" if reason == "where" else reason for reason in reasons]
    return f"by {' or '.join(names)} (select.by: {by})" if names else "by its rank"


def _outranked(summary: SelectionSummary, pair: Pair) -> str:
    by, threshold, keep = summary.config.get("by"), summary.threshold, summary.config.get("keep")
    has_top = isinstance(keep, dict) and keep.get("drop_highest", 0) > 0
    if threshold is None:
        return "it lies outside the band of its group" if has_top else "its group is full"
    if by != "utility":
        return f"{by} is below {number(threshold)}" + (" or lies above the band" if has_top else "")
    if has_top and pair.utility > threshold:
        return f"its utility {number(pair.utility)} lies above the band that is kept"
    return f"its utility is the threshold {number(threshold)}, which more pairs have than are kept"


def _nearest(
    run: RunFolder, shards: list[ShardInfo], shard: int, row: int, count_of: int
) -> list[tuple[tuple[int, int], tuple[float, float, str, float]]]:
    """The pairs nearest in image embedding: place, then image and text similarity, uid, utility."""
    own: Floats | None = None
    for info, table in _columns(run, [info for info in shards if info.index == shard], ["embedding"]):
        own = _embeddings(table)[row] if info.index == shard and "embedding" in table.column_names else None
    if own is None or not count_of:
        return []
    half = len(own) // 2
    best: list[tuple[float, tuple[int, int], tuple[float, float, str, float]]] = []
    for info, table in _columns(run, shards, ["embedding", "uid", "utility", "index"]):
        vectors = _embeddings(table)
        image, text = vectors[:, :half] @ own[:half], vectors[:, half:] @ own[half:]
        scored = np.isfinite(table["utility"].to_numpy(zero_copy_only=False))
        image[~np.isfinite(image) | ~scored] = -np.inf
        if info.index == shard:
            image[row] = -np.inf
        for place in np.argsort(-image, kind="stable")[:count_of]:
            if np.isfinite(image[place]):
                values = table.slice(int(place), 1).select(["uid", "utility", "index"]).to_pylist()[0]
                near = (float(image[place]), float(text[place]), values["uid"], float(values["utility"]))
                best.append((-float(image[place]), (info.index, values["index"]), near))
        best = sorted(best, key=lambda entry: entry[:2])[:count_of]
    return [entry[1:] for entry in best]


def _embeddings(table: pq.Table) -> Floats:
    """The embedding column as float64 `[n, 2d]`; NaN where there is none."""
    column = table["embedding"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    vectors = np.full((len(column), column.type.list_size), np.nan)
    vectors[column.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, column.type.list_size)
    return vectors


def print_story(story: Story, console: Console | None = None, *, image: str | None = None) -> None:
    """Print a pair's story; `image` is a local path to write its image to, as stored in the shard."""
    console = console or Console()
    pair, content = story.pair, story.content
    if content and content.image and console.color_system:
        picture = open_image(content.image, story.max_pixels, 120)
        if picture:
            console.print(half_blocks(picture, 60))
    if image is not None:
        if content is None or content.image is None:
            raise InputError(f"{pair.uid}: its shard holds no image to write to {image}")
        storage.write_bytes(image, content.image)
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(story):
        facts.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
    console.print(facts)
    if pair.terms:
        terms = Table("checkpoint", "term", "share of the score", title="Terms", title_justify="left")
        for name, term in zip(story.checkpoints, pair.terms, strict=True):
            counts = math.isfinite(term)
            share = percent(term / pair.score) if pair.score and counts else number(None)
            terms.add_row(name, number(term) if counts else "trained on the pair", share)
        console.print(terms)
    if story.neighbours:
        near = Table(
            "uid", "image", "text", "utility", "caption", title="Nearest images (cosine)", title_justify="left"
        )
        for other in story.neighbours:
            near.add_row(
                other.uid[:12],
                f"{other.image:.3f}",
                f"{other.text:.3f}",
                number(other.utility),
                Text(plain(other.caption, 80)),
            )
        console.print(near)


def _facts(story: Story) -> Iterator[tuple[str, str]]:
    pair = story.pair
    yield "uid", pair.uid
    yield "place", f"shard {pair.shard}, index {pair.index}, key {plain(pair.key, 100)}"
    yield "caption", plain(story.content.caption, 600) if story.content else "(the shard cannot be read any more)"
    if pair.source:
        yield "source", plain(pair.source, 100)
    if pair.width:
        yield "image", f"{pair.width} \u00d7 {pair.height} pixels"
    if pair.status != "ok":
        yield "rejected", f"{pair.status}: {plain(pair.error, 300)}"
    else:
        yield (
            "utility",
            f"{plus_minus(pair.utility, pair.utility_std)}, rank {count(story.rank)} of {count(story.scored)}",
        )
        yield "score", number(pair.score) + (", predicted from the embedding" if pair.predicted else "")
        yield "loss", f"{number(pair.loss)} nats"
        yield "similarity", number(pair.similarity)
    for name, verdict in story.verdicts.items():
        yield f"selection {name}", verdict
