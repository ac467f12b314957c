"""How two selections of a run differ: what both keep, where they part, and how differently they rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow.parquet as pq

from pipeline.arrays import Bool, Float64, Int64
from pipeline.config import SelectConfig
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection.prepare import make_recipe, work_out
from pipeline.selection.ranks import RankSketch, RankTable, merged
from pipeline.selection.recipe import OpenShard, Recipe
from pipeline.selection.scan import ScoreShard, committed_shards, joined_fingerprint
from pipeline.selection.summary import SelectionSummary, read_summary
from pipeline.selection.tasks import MapTasks, chunks
from pipeline.selection.write import keep_file
from pipeline.store import storage

Triple = Int64
Sums = Float64


@dataclass(frozen=True)
class Overlap:
    """Pairs of one place (a shard, a source, or all) that both selections keep, and that only one of them keeps."""

    name: str
    both: int
    only_a: int
    only_b: int

    @property
    def jaccard(self) -> float:
        """Share of what either keeps that both keep; 1 where neither keeps anything."""
        either = self.both + self.only_a + self.only_b
        return self.both / either if either else 1.0


@dataclass(frozen=True)
class ComparisonSummary:
    """Two selections side by side. `shards` and `sources` come with the largest difference first.

    `spearman` compares the rankings by which the selections choose (their `by`), over the pairs that both rank.
    `mean_utility` is that of the pairs both keep, only a, only b (NaN where there are none).
    """

    a: str
    b: str
    overall: Overlap
    shards: list[Overlap]
    sources: list[Overlap]
    spearman: float
    mean_utility: tuple[float, float, float]


def compare(run: RunFolder, a: str, b: str, *, map_tasks: MapTasks = map) -> ComparisonSummary:
    """Compare two finished selections of a run; nothing is written.

    Raises `StageError` where one is missing, or was made from scores that have changed since.
    """
    shards, own = committed_shards(run)
    summaries = [read_summary(run, name) for name in (a, b)]
    for summary in summaries:
        if summary.scores != joined_fingerprint(own, summary.config["join"]):
            raise StageError(f"{summary.folder}: made from other scores; make it again with `diffprune select`")
    recipes = tuple(_ranking(run, summary, shards, map_tasks) for summary in summaries)
    sketches = list(map_tasks(partial(_sketch_values, recipes), chunks(shards)))
    tables = tuple(merged(task[place] for task in sketches).table() for place in (0, 1))
    folders = tuple(summary.folder for summary in summaries)
    total = _Counted()
    for task in map_tasks(partial(_compare_shards, recipes, tables, folders), chunks(shards)):
        for part in task:
            total.add(part)
    return total.summarise(a, b)


@dataclass
class _Counted:
    """What shards add up to. Counts and utility sums are [both, only a, only b]; `ranks` are the sums over pairs that
    both rank of 1, x, y, x^2, y^2 and x y, with x and y the two ranks less one half."""

    counts: Triple = field(default_factory=lambda: np.zeros(3, np.int64))
    utility: Sums = field(default_factory=lambda: np.zeros(3))
    ranks: Sums = field(default_factory=lambda: np.zeros(6))
    shards: dict[str, Triple] = field(default_factory=dict)
    sources: dict[str, Triple] = field(default_factory=dict)

    def add(self, other: _Counted) -> None:
        """Add what another shard counted."""
        self.counts += other.counts
        self.utility += other.utility
        self.ranks += other.ranks
        self.shards |= other.shards
        for source, counts in other.sources.items():
            self.sources[source] = self.sources.get(source, 0) + counts

    def summarise(self, a: str, b: str) -> ComparisonSummary:
        """The comparison of selections `a` and `b`."""
        count, x, y, xx, yy, xy = (float(value) for value in self.ranks)
        spread = (xx - x * x / max(count, 1)) * (yy - y * y / max(count, 1))
        spearman = (xy - x * y / max(count, 1)) / math.sqrt(spread) if spread > 0 else math.nan
        means = [float(u) / int(n) if n else math.nan for u, n in zip(self.utility, self.counts, strict=True)]
        return ComparisonSummary(
            a=a,
            b=b,
            overall=_overlap("all", self.counts),
            shards=_largest_first(self.shards),
            sources=_largest_first(self.sources),
            spearman=spearman,
            mean_utility=(means[0], means[1], means[2]),
        )


def _overlap(name: str, counts: Triple) -> Overlap:
    both, only_a, only_b = counts.tolist()
    return Overlap(name, both, only_a, only_b)


def _largest_first(counts: dict[str, Triple]) -> list[Overlap]:
    found = [_overlap(name, triple) for name, triple in counts.items()]
    return sorted(found, key=lambda overlap: -(overlap.only_a + overlap.only_b))


def _ranking(run: RunFolder, summary: SelectionSummary, shards: Sequence[ScoreShard], map_tasks: MapTasks) -> Recipe:
    """The ranking that a selection is made by, without its conditions and policy."""
    config = SelectConfig.model_validate(summary.config)
    recipe = make_recipe(SelectConfig(by=config.by, join=config.join), shards[0], summary.seed, scratch="")
    return work_out(run, recipe, shards, lambda _: None, map_tasks)


def _sketch_values(recipes: Sequence[Recipe], shards: Sequence[ScoreShard]) -> list[RankSketch]:
    sketches = [RankSketch() for _ in recipes]
    for shard in shards:
        for recipe, sketch in zip(recipes, sketches, strict=True):
            with OpenShard(recipe, shard) as opened:
                for judged in opened.judged():
                    sketch.add(judged.value)
    return sketches


def _compare_shards(
    recipes: Sequence[Recipe], tables: Sequence[RankTable], folders: Sequence[str], shards: Sequence[ScoreShard]
) -> list[_Counted]:
    return [_compare_shard(recipes, tables, folders, shard) for shard in shards]


def _compare_shard(
    recipes: Sequence[Recipe], tables: Sequence[RankTable], folders: Sequence[str], shard: ScoreShard
) -> _Counted:
    counted = _Counted()
    kept = [_kept_rows(folder, shard) for folder in folders]
    fate = np.select([kept[0] & kept[1], kept[0], kept[1]], [0, 1, 2], default=3)
    counted.counts += np.bincount(fate, minlength=4)[:3]
    counted.shards[shard.source] = counted.counts.copy()
    with OpenShard(recipes[0], shard) as first, OpenShard(recipes[1], shard) as second:
        for span in first.spans():
            here = fate[span.start : span.start + span.rows]
            utility = np.nan_to_num(span.numeric("utility").astype(np.float64))
            counted.utility += np.bincount(here, weights=utility, minlength=4)[:3]
            source = span.arrow("source")
            names = [str(name or "") for name in source.dictionary.to_pylist()]
            codes = np.asarray(source.indices.fill_null(len(names)).to_numpy(zero_copy_only=False), dtype=np.int64)
            table = np.bincount(codes * 4 + here, minlength=4 * len(names) + 4).reshape(-1, 4)
            for name, counts in zip([*names, ""], table[:, :3], strict=True):
                if counts.any():
                    counted.sources[name] = counted.sources.get(name, 0) + counts
            ranks = [np.full(span.rows, np.nan), np.full(span.rows, np.nan)]
            for side, opened, rank in zip((0, 1), (first, second), ranks, strict=True):
                judged = opened.judge(span)
                rank[judged.places() - span.start] = tables[side].rank(judged.value) - 0.5
            ranked = np.isfinite(ranks[0]) & np.isfinite(ranks[1])
            x, y = ranks[0][ranked], ranks[1][ranked]
            counted.ranks += [len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y]
    return counted


def _kept_rows(folder: str, shard: ScoreShard) -> Bool:
    kept = np.zeros(shard.rows, dtype=bool)
    with storage.open_read(keep_file(folder, shard.index)) as handle:
        kept[pq.read_table(handle, columns=["index"])["index"].to_numpy()] = True
    return kept
