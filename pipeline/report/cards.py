"""The gallery: one card per pair worth looking at, its foreign text made plain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import DataConfig
from pipeline.estimators import facts_of
from pipeline.pictures import data_uri, open_image
from pipeline.report.collect import Findings
from pipeline.report.contents import Content, Place
from pipeline.report.rows import Pair
from pipeline.text import count, number, plain, plus_minus

#: Longest side of a thumbnail, pixels: sharp at card size on screens of two pixels per point.
SIDE = 224
#: Images no longer than this are shown with visible pixels.
TINY = 72


@dataclass(frozen=True)
class Gallery:
    """A group of cards, with the sentence that says what it is."""

    id: str
    title: str
    about: str


GALLERIES = ("highest", "lowest", "threshold", "rejected")


def galleries(estimator: str) -> list[Gallery]:
    """All galleries in the order of the page; what is said of them is true of this estimator."""
    helps, harms = "", ""
    if facts_of(estimator).for_a_target:
        helps, harms = ": training on them helps the target most", ": training on them works against the target"
    tight = "here the choice is tight"
    return [
        Gallery("highest", "Highest", f"The pairs of highest utility, best first{helps}."),
        Gallery("lowest", "Lowest", f"The pairs of lowest utility, worst first{harms}."),
        Gallery("threshold", "Around the threshold", f"The pairs nearest to the cut, best first: {tight}."),
        Gallery("rejected", "Rejected", "The first pairs of each reason for which no score could be computed."),
    ]


@dataclass(frozen=True)
class Card:
    """What the page shows of one pair; all text is plain, and still to be escaped."""

    gallery: str
    reason: str
    swatch: str
    source: str
    cluster: str
    caption: str
    words: str
    alt: str
    image: str
    image_width: int
    image_height: int
    tiny: bool
    rank: str
    utility: str
    details: list[tuple[str, str]]


def make_cards(
    found: Findings,
    contents: Mapping[Place, Content],
    checkpoints: Sequence[str],
    data: DataConfig,
    clusters: Mapping[Place, int],
) -> list[Card]:
    """Cards of all galleries, in order; `clusters` has the number of the cluster of some pairs."""
    return [
        _card(
            gallery,
            pair,
            found,
            contents.get((pair.shard, pair.index)),
            checkpoints,
            data.max_pixels,
            str(clusters.get((pair.shard, pair.index), "")),
        )
        for gallery in GALLERIES
        for pair in found.galleries.get(gallery, [])
    ]


def _card(
    gallery: str,
    pair: Pair,
    found: Findings,
    content: Content | None,
    checkpoints: Sequence[str],
    max_pixels: int,
    cluster: str,
) -> Card:
    caption = plain(content.caption) if content else ""
    scored = pair.status == "ok"
    reason = ("kept" if pair.kept else "pruned") if scored else f"rejected: {pair.status}"
    image = open_image(content.image, max_pixels, SIDE) if content and content.image else None
    rank = found.ranks.get((pair.shard, pair.index)) if scored else None
    return Card(
        gallery=gallery,
        reason=reason,
        swatch=reason if scored else "rejected",
        source=plain(pair.source, 80),
        cluster=cluster,
        caption=caption,
        words=f"{caption} {pair.uid}",
        alt=f"Image of the pair captioned: {plain(caption, 120)}" if caption else "Image of a pair without a caption",
        image=data_uri(image) if image else "",
        image_width=image.width if image else 0,
        image_height=image.height if image else 0,
        tiny=image is not None and max(image.size) <= TINY,
        rank=f"{count(rank)} of {count(found.scored)}" if rank else "",
        utility=plus_minus(pair.utility, pair.utility_std) if scored else "",
        details=[*_details(pair, scored, checkpoints), *([("cluster", cluster)] if cluster else [])],
    )


def _details(pair: Pair, scored: bool, checkpoints: Sequence[str]) -> list[tuple[str, str]]:
    facts = [("uid", pair.uid), ("shard", f"{pair.shard}, index {pair.index}"), ("key", plain(pair.key, 120))]
    if pair.source:
        facts.append(("source", plain(pair.source, 120)))
    if pair.width and pair.height:
        facts.append(("image", f"{pair.width} \u00d7 {pair.height} px"))
    if not scored:
        return [*facts, ("why", plain(pair.error, 300) or pair.status)]
    for name, value in (("similarity", pair.similarity), ("loss", pair.loss), ("score", pair.score)):
        if math.isfinite(value):
            facts.append((name, number(value)))
    if pair.predicted:
        facts.append(("score is", "predicted from the embedding"))
    if len(pair.terms) > 1:
        names = checkpoints if len(checkpoints) == len(pair.terms) else [str(i + 1) for i in range(len(pair.terms))]
        facts += [(f"term, {name}", number(term)) for name, term in zip(names, pair.terms, strict=True) if term == term]
    return facts
