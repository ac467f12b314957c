"""The sections on groups of pairs: sources that gain and lose, captions that repeat, clusters of alike images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.report.clusters import Clusters
from pipeline.report.contents import Content
from pipeline.report.figures import Interval, interval_figure
from pipeline.report.groups import Group, GroupCounter
from pipeline.report.plots import Figure
from pipeline.text import NO_SOURCE, count, percent, plain, plural

#: Rows of an interval plot of groups.
SHOWN = 20
#: Captions count as classes when those with this many pairs cover this share of all pairs.
CLASS_PAIRS = 10
CLASS_COVER = 0.25


@dataclass(frozen=True)
class GroupSection:
    """A section with one interval plot of kept shares."""

    id: str
    short: str
    title: str
    about: str
    figure: Figure


def source_section(counter: GroupCounter, key: str) -> GroupSection | None:
    """Kept share of the sources that gained or lost most pairs; None unless pairs have at least two sources."""
    number_of = len(counter)
    if number_of < 2:
        return None
    groups = counter.gained_and_lost(SHOWN)
    overall = counter.kept / counter.pairs
    intervals = [_interval(group, plain(str(group.name), 60) or NO_SOURCE, overall) for group in groups]
    about = f"A pair's source is the json key {key!r} (its domain, for addresses). There are "
    about += f"{'at least ' if counter.dropped else ''}{plural(number_of, 'source')}"
    about += f"; shown are the {len(groups)} that change most." if number_of > len(groups) else "."
    figure = _shares("Kept share by source", intervals, overall)
    return GroupSection("sources", "Sources", "Sources gained and lost", about, figure)


def frequent_captions(counter: GroupCounter) -> list[Group]:
    """The most frequent captions, or none of them when captions do not form classes."""
    classes = counter.largest(at_least=CLASS_PAIRS)
    if len(classes) < 2 or sum(group.pairs for group in classes) < CLASS_COVER * counter.pairs:
        return []
    return classes[:SHOWN]


def caption_section(
    counter: GroupCounter, groups: list[Group], contents: Mapping[tuple[int, int], Content]
) -> GroupSection | None:
    """Kept share of the captions in `groups`, from `frequent_captions`; None without any."""
    if not groups:
        return None
    ordered = sorted(groups, key=lambda group: -group.share)
    overall = counter.kept / counter.pairs
    intervals = [_interval(group, _caption(group, contents) or f"caption {group.name}", overall) for group in ordered]
    repeated = sum(group.pairs for group in groups)
    about = (
        f"Captions repeat: the {count(len(groups))} most frequent ones cover {percent(repeated / counter.pairs)} of "
        "the scored pairs. A signed score can shift whole classes; quotas (select.balance) hold their shares."
    )
    figure = _shares("Kept share by caption", intervals, overall)
    return GroupSection("captions", "Repeated captions", "Kept share by repeated caption", about, figure)


def cluster_section(clusters: Clusters, contents: Mapping[tuple[int, int], Content]) -> GroupSection:
    """Kept share of clusters of image embeddings, each named by the caption of its most central pair."""
    overall = clusters.kept_share
    sampled = sum(group.pairs for group in clusters.groups)
    intervals = []
    for group in sorted(clusters.groups, key=lambda group: -group.share):
        caption = _caption(group, contents)
        intervals.append(_interval(group, f"{group.name}: {caption}" if caption else str(group.name), overall))
    about = (
        f"The images of {plural(sampled, 'scored pair')} in {plural(len(clusters.groups), 'cluster')} of alike "
        "embeddings (spherical k-means at the last checkpoint), each with the caption of its most central pair. The "
        "numbers are those of the gallery's filter. Quotas (select.balance) hold the shares of clusters."
    )
    figure = _shares("Kept share by cluster", intervals, overall)
    return GroupSection("clusters", "Clusters", "Kept share by kind of image", about, figure)


def _caption(group: Group, contents: Mapping[tuple[int, int], Content]) -> str:
    """The caption of a group's example, made plain; empty where it cannot be read."""
    content = contents.get(group.example)
    return plain(content.caption, 60) if content else ""


def _interval(group: Group, name: str, overall: float) -> Interval:
    low, high = group.interval()
    css = "kept" if low > overall else "pruned" if high < overall else "rejected"
    note = f"{percent(group.share)} of {plural(group.pairs, 'pair')}"
    return Interval(name, group.share, low, high, note, css)


def _shares(title: str, intervals: list[Interval], overall: float) -> Figure:
    above = sum(1 for interval in intervals if interval.low > overall)
    below = sum(1 for interval in intervals if interval.high < overall)
    see = (
        f"The dashed line is the share kept of all scored pairs, {percent(overall)}. By more than chance "
        f"explains (95\u202f% intervals), {count(above) if above else 'none'} of the {len(intervals)} shown "
        f"{'is' if above == 1 else 'are'} above it and {count(below) if below else 'none'} below."
    )
    return interval_figure(title, see, "kept share, %", intervals, mark=overall, factor=100)
