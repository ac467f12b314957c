"""The sections on groups of pairs: which sources gain and lose, and how captions that repeat are treated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.report.contents import Content
from pipeline.report.figures import Interval, interval_figure
from pipeline.report.groups import Group, GroupCounter
from pipeline.report.plots import Figure
from pipeline.text import count, percent, plain, plural

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
    intervals = [_interval(group, plain(str(group.name), 60) or "(no source)", counter) for group in groups]
    about = f"A pair's source is the json key {key!r} (its domain, for addresses). There are "
    about += f"{'at least ' if counter.dropped else ''}{plural(number_of, 'source')}"
    about += f"; shown are the {len(groups)} that change most." if number_of > len(groups) else "."
    figure = _shares("Kept share by source", intervals, counter)
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
    intervals = []
    for group in ordered:
        content = contents.get(group.example)
        caption = plain(content.caption, 60) if content else ""
        intervals.append(_interval(group, caption or f"caption {group.name}", counter))
    repeated = sum(group.pairs for group in groups)
    about = (
        f"Captions repeat: the {count(len(groups))} most frequent ones cover {percent(repeated / counter.pairs)} of "
        "the scored pairs. A signed score can shift whole classes; quotas (select.balance) hold their shares."
    )
    figure = _shares("Kept share by caption", intervals, counter)
    return GroupSection("captions", "Repeated captions", "Kept share by repeated caption", about, figure)


def _interval(group: Group, name: str, counter: GroupCounter) -> Interval:
    low, high = group.interval()
    overall = counter.kept / counter.pairs
    css = "kept" if low > overall else "pruned" if high < overall else "rejected"
    note = f"{percent(group.share)} of {plural(group.pairs, 'pair')}"
    return Interval(name, group.share, low, high, note, css)


def _shares(title: str, intervals: list[Interval], counter: GroupCounter) -> Figure:
    overall = counter.kept / counter.pairs
    above = sum(1 for interval in intervals if interval.low > overall)
    below = sum(1 for interval in intervals if interval.high < overall)
    see = (
        f"The dashed line is the share kept of all scored pairs, {percent(overall)}. Of the {len(intervals)} shown, "
        f"{count(above) if above else 'none'} lie above it and {count(below) if below else 'none'} below it by more "
        "than chance explains (95\u202f% intervals)."
    )
    return interval_figure(title, see, "kept share, %", intervals, mark=overall, factor=100)
