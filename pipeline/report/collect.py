"""What the page says about a run's scores, gathered in two passes over the score files in bounded memory.

The first pass counts, finds the extremes and draws a seeded sample of the scored pairs; the sample fixes the
ranges of the plots, and the second pass fills exact histograms over all pairs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.inventory import ShardInfo
from pipeline.report.groups import GroupCounter
from pipeline.report.rows import Bools, Floats, Pair, ShardRows, iterate_rows, scored_shards
from pipeline.run import RunFolder

#: Scored pairs drawn for rank correlations, quantiles and the ranges of the plots.
SAMPLE = 50_000
#: Most and fewest bins of a histogram; in between, Rice's rule, twice the cube root of the number of pairs.
MOST_BINS, FEWEST_BINS = 72, 24
#: Letters of a source that tell it from others.
SOURCE_LETTERS = 100
#: Share of the pairs beyond either end of a plot's range; they are counted in its outermost bins.
TAIL = 0.003
#: Distances between the quartiles that a plot reaches beyond them at most: with heavy tails all else would be one bin.
REACH = 6


@dataclass
class Histogram:
    """Counts of kept and pruned pairs in bins of one value; pairs beyond the ends are in the outermost bins."""

    edges: Floats
    kept: NDArray[np.int64]
    pruned: NDArray[np.int64]
    beyond: int = 0

    def add(self, values: Floats, kept: Bools) -> None:
        """Count `values [n]`."""
        self.beyond += int(((values < self.edges[0]) | (values > self.edges[-1])).sum())
        clipped = np.clip(values, self.edges[0], self.edges[-1])
        self.kept += np.histogram(clipped[kept], self.edges)[0]
        self.pruned += np.histogram(clipped[~kept], self.edges)[0]


@dataclass
class Density:
    """Counts of pairs in the cells of a grid, int64 `[x bins, y bins]`; pairs off the grid are in its border."""

    x_edges: Floats
    y_edges: Floats
    counts: NDArray[np.int64]

    def add(self, x: Floats, y: Floats) -> None:
        """Count the points whose two coordinates are finite."""
        finite = np.isfinite(x) & np.isfinite(y)
        x = np.clip(x[finite], self.x_edges[0], self.x_edges[-1])
        y = np.clip(y[finite], self.y_edges[0], self.y_edges[-1])
        self.counts += np.histogram2d(x, y, [self.x_edges, self.y_edges])[0].astype(np.int64)


@dataclass
class Cut:
    """Where the kept pairs begin.

    Attributes:
        lowest_kept, highest_pruned: extremes of utility on either side.
        centre: the lowest kept utility where one value divides kept from pruned, else the quantile at the pruned
            share.
    """

    lowest_kept: float = np.inf
    highest_pruned: float = -np.inf
    centre: float = float("nan")

    @property
    def sharp(self) -> bool:
        """Whether one value of utility divides the kept pairs from the pruned ones."""
        return -np.inf < self.highest_pruned <= self.lowest_kept < np.inf


class Sample:
    """A seeded uniform draw of at most `size` scored pairs, the same for any order of shards."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.names = ("utility", "similarity", "loss", "utility_std", "width", "height", "caption_length")
        self.parts: list[tuple[NDArray[np.uint64], Floats, Bools]] = []
        self.held = 0
        self.number_of_terms: int | None = None

    def add(self, rows: ShardRows) -> None:
        """Offer the scored pairs of a shard."""
        if not rows.scored.any():  # it says nothing of how many terms there are
            return
        draws = np.random.default_rng([self.seed, rows.shard]).integers(0, 1 << 63, len(rows), dtype=np.uint64)
        terms = rows.terms()
        width = terms.shape[1]
        self.number_of_terms = width if self.number_of_terms is None else min(self.number_of_terms, width)
        values = np.column_stack([rows.floats(name)[rows.scored] for name in self.names] + [terms])
        self.parts.append((draws[rows.scored], values, rows.kept[0][rows.scored]))
        self.held += len(values)
        if self.held > 2 * self.size:
            self._trim()

    def _trim(self) -> None:
        width = len(self.names) + (self.number_of_terms or 0)
        draws = np.concatenate([part[0] for part in self.parts])
        values = np.concatenate([part[1][:, :width] for part in self.parts])
        kept = np.concatenate([part[2] for part in self.parts])
        order = np.argsort(draws, kind="stable")[: self.size]
        self.parts = [(draws[order], values[order], kept[order])]
        self.held = len(order)

    def finish(self) -> Sample:
        """Bring the parts together; call once, after the last `add`."""
        if self.parts:
            self._trim()
        else:
            self.parts = [(np.empty(0, np.uint64), np.empty((0, len(self.names))), np.empty(0, bool))]
        return self

    def __len__(self) -> int:
        return self.held

    def __getitem__(self, name: str) -> Floats:
        return self.parts[0][1][:, self.names.index(name)]

    @property
    def terms(self) -> Floats:
        """Terms per checkpoint, float64 `[n, m]`."""
        return self.parts[0][1][:, len(self.names) :]

    @property
    def kept(self) -> Bools:
        """Which of the drawn pairs are kept."""
        return self.parts[0][2]


@dataclass
class Comparison:
    """This selection against another one: pairs and mean values by who keeps them."""

    name: str
    #: cell -> [pairs, pairs with a finite similarity, sum of utility, sum of similarity]
    cells: dict[str, list[float]] = field(
        default_factory=lambda: {cell: [0, 0, 0.0, 0.0] for cell in ("both", "only this", "only that", "neither")}
    )

    def add(self, rows: ShardRows, this: Bools, that: Bools) -> None:
        """Count the scored pairs of a shard."""
        utility, similarity = rows.floats("utility"), rows.floats("similarity")
        for cell, mask in zip(self.cells, (this & that, this & ~that, ~this & that, ~this & ~that), strict=True):
            mask = mask & rows.scored
            finite = mask & np.isfinite(similarity)
            sums = (mask.sum(), finite.sum(), utility[mask].sum(), similarity[finite].sum())
            self.cells[cell] = [held + float(new) for held, new in zip(self.cells[cell], sums, strict=True)]

    @property
    def jaccard(self) -> float:
        """Shared pairs as a part of the pairs that either keeps."""
        union = sum(self.cells[cell][0] for cell in ("both", "only this", "only that"))
        return self.cells["both"][0] / union if union else 1.0


class Best:
    """The `count` pairs with the smallest order value, ties by uid; none where `count` is 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.held: list[tuple[float, str, Pair]] = []

    def add(self, rows: ShardRows, order: Floats, mask: Bools) -> None:
        """Offer the pairs of a shard where `mask [n]`, by `order [n]`."""
        if self.count == 0:
            return
        candidates = np.flatnonzero(mask)
        if len(self.held) == self.count:
            candidates = candidates[order[candidates] <= self.held[-1][0]]
        if len(candidates) > self.count:
            nearest = np.argpartition(order[candidates], self.count)[: self.count]
            candidates = candidates[nearest]
        offered = [(float(order[row]), pair.uid, pair) for row in candidates for pair in [rows.pair(int(row))]]
        self.held = sorted(self.held + offered, key=lambda entry: entry[:2])[: self.count]

    @property
    def pairs(self) -> list[Pair]:
        """The pairs found, best first."""
        return [entry[2] for entry in self.held]


@dataclass
class Findings:
    """Everything the page needs to know of the scores and one selection."""

    selection: str
    shards: list[ShardInfo]
    missing_shards: int
    total: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    significant: dict[str, int] = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)
    sources: GroupCounter = field(default_factory=GroupCounter)
    captions: GroupCounter = field(default_factory=GroupCounter)
    comparisons: list[Comparison] = field(default_factory=list)
    galleries: dict[str, list[Pair]] = field(default_factory=dict)
    ranks: dict[tuple[int, int], int] = field(default_factory=dict)
    sample: Sample = field(default_factory=lambda: Sample(SAMPLE, 0))
    histogram: Histogram | None = None
    densities: dict[str, Density] = field(default_factory=dict)

    @property
    def scored(self) -> int:
        """Pairs with a finite utility."""
        return self.total - sum(self.rejected.values())

    @property
    def pruned(self) -> int:
        """Scored pairs that are not kept."""
        return self.scored - self.kept


def collect(
    run: RunFolder, inventory: list[ShardInfo], names: list[str], gallery: int, seed: int, sample: int = SAMPLE
) -> Findings:
    """Read the scores twice and bring together what the page shows.

    Args:
        run: the run's folder.
        inventory: its input shards.
        names: selections; the first is the one reported, the others are compared with it.
        gallery: pairs per gallery.
        seed: decides the sample.
        sample: scored pairs drawn for quantiles and rank correlations.
    """
    shards = scored_shards(run, inventory)
    found = Findings(names[0], shards, len(inventory) - len(shards), sample=Sample(sample, seed))
    found.comparisons = [Comparison(name) for name in names[1:]]
    _first_pass(run, found, names, gallery)
    if found.scored:
        _second_pass(run, found, names[:1], gallery)
    return found


def _first_pass(run: RunFolder, found: Findings, names: list[str], gallery: int) -> None:
    highest, lowest = Best(gallery), Best(gallery)
    rejected: dict[str, Best] = {}
    for rows in iterate_rows(run, found.shards, names):
        kept = rows.kept[0] & rows.scored
        utility = rows.floats("utility")
        found.total += len(rows)
        found.kept += int(kept.sum())
        found.rejected.update(rows.reasons[~rows.scored].tolist())
        found.sample.add(rows)
        highest.add(rows, -utility, rows.scored)
        lowest.add(rows, utility, rows.scored)
        for reason in sorted(set(rows.reasons[~rows.scored].tolist())):
            position = np.arange(len(rows), dtype=np.float64) + rows.shard * 1e9
            rejected.setdefault(reason, Best(4)).add(rows, position, ~rows.scored & (rows.reasons == reason))
        _count_groups(found, rows, kept)
        _widen_cut(found.cut, utility, kept, rows.scored & ~kept)
        for comparison, other in zip(found.comparisons, rows.kept[1:], strict=True):
            comparison.add(rows, rows.kept[0], other)
    found.sample.finish()
    found.galleries["highest"] = highest.pairs
    found.galleries["lowest"] = lowest.pairs
    found.galleries["rejected"] = [pair for best in rejected.values() for pair in best.pairs]


def _count_groups(found: Findings, rows: ShardRows, kept: Bools) -> None:
    index = rows.table["index"].to_numpy()[rows.scored]
    if "source" in rows.table.column_names:
        sources = pc.utf8_slice_codeunits(rows.table["source"].fill_null(""), 0, SOURCE_LETTERS)
        names = sources.to_numpy()[rows.scored].astype(str)
        found.sources.add(names, kept[rows.scored], rows.shard, index)
    if "caption_id" in rows.table.column_names:
        captions = rows.table["caption_id"].fill_null(0).to_numpy()[rows.scored]
        found.captions.add(captions, kept[rows.scored], rows.shard, index)
    spread = rows.floats("utility_std")
    known = rows.scored & np.isfinite(spread)
    if known.any():
        utility = rows.floats("utility")
        counts = Counter(found.significant)
        counts["known"] += int(known.sum())
        counts["helpful"] += int((known & (utility > 2 * spread)).sum())
        counts["harmful"] += int((known & (utility < -2 * spread)).sum())
        found.significant = dict(counts)


def _widen_cut(cut: Cut, utility: Floats, kept: Bools, pruned: Bools) -> None:
    if kept.any():
        cut.lowest_kept = min(cut.lowest_kept, float(utility[kept].min()))
    if pruned.any():
        cut.highest_pruned = max(cut.highest_pruned, float(utility[pruned].max()))


def _second_pass(run: RunFolder, found: Findings, names: list[str], gallery: int) -> None:
    sample = found.sample
    if found.cut.sharp:
        found.cut.centre = found.cut.lowest_kept
    elif found.kept and found.pruned:
        found.cut.centre = float(np.quantile(sample["utility"], found.pruned / found.scored))
    bins = int(min(max(2 * found.scored ** (1 / 3), FEWEST_BINS), MOST_BINS))
    edges = _edges(sample["utility"], bins, found.cut.centre)
    if found.cut.sharp:  # no bin shall hold both kept and pruned pairs
        edges += found.cut.centre - edges[np.argmin(np.abs(edges - found.cut.centre))]
    grid = (2 * bins // 3, bins // 2)
    zeros = np.zeros(len(edges) - 1, dtype=np.int64)
    found.histogram = Histogram(edges, zeros, zeros.copy())
    for name in ("similarity", "loss"):
        if np.isfinite(sample[name]).any():
            x_edges = _edges(sample[name], grid[0])
            y_edges = _edges(sample["utility"], grid[1], found.cut.centre)
            found.densities[name] = Density(x_edges, y_edges, np.zeros(grid, dtype=np.int64))
    above, below = Best(gallery - gallery // 2), Best(gallery // 2)
    higher: Counter[float] = Counter()
    shown = np.unique([pair.utility for pairs in found.galleries.values() for pair in pairs if pair.status == "ok"])
    for rows in iterate_rows(run, found.shards, names):
        kept, utility = rows.kept[0], rows.floats("utility")
        found.histogram.add(utility[rows.scored], kept[rows.scored])
        for name, density in found.densities.items():
            density.add(rows.floats(name)[rows.scored], utility[rows.scored])
        if np.isfinite(found.cut.centre):
            distance = np.abs(utility - found.cut.centre)
            above.add(rows, distance, rows.scored & kept)
            below.add(rows, distance, rows.scored & ~kept)
        ascending = np.sort(utility[rows.scored])
        for value, position in zip(shown.tolist(), np.searchsorted(ascending, shown, side="right"), strict=True):
            higher[value] += len(ascending) - int(position)
    around = sorted(above.pairs + below.pairs, key=lambda pair: -pair.utility)
    found.galleries["threshold"] = around
    for pair in found.galleries["highest"] + found.galleries["lowest"]:
        found.ranks[pair.shard, pair.index] = higher[pair.utility] + 1


def _edges(values: Floats, bins: int, include: float = float("nan")) -> Floats:
    finite = values[np.isfinite(values)]
    low, first, third, high = np.quantile(finite, [TAIL, 0.25, 0.75, 1 - TAIL])
    if third > first:
        reach = REACH * (third - first)
        low, high = max(low, first - reach), min(high, third + reach)
    if np.isfinite(include):
        low, high = min(low, include), max(high, include)
    if not high > low:
        margin = max(abs(float(low)) * 1e-3, 1e-9)
        low, high = low - margin, high + margin
    return np.linspace(low, high, bins + 1)
