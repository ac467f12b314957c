"""What a selection would keep, and how two selections differ, on the terminal; nothing is written."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline import text
from pipeline.config import Config
from pipeline.run import RunFolder
from pipeline.selection.compare import compare
from pipeline.selection.select import select
from pipeline.selection.tasks import thread_map
from pipeline.stages import summary
from pipeline.stages.agreeing import say_other_scores
from pipeline.stages.job import open_job
from pipeline.stages.judging import judge_rankings
from pipeline.stages.selecting import require_scores
from pipeline.store import storage
from pipeline.text import NO_SOURCE

#: Rows of a table; what comes after is counted.
LONGEST_TABLE = 20


def show_plan(config: Config) -> None:
    """Print what a selection would keep; write nothing."""
    job = open_job(config)
    require_scores(job)
    say_other_scores(job, "select")
    plan = select(job.folder, config.select, seed=config.seed, dry_run=True, map_tasks=thread_map)
    console = Console(markup=False, emoji=False)  # sources and shards have names of others' making
    console.print(
        f"{plan.total:,} pairs: {plan.kept:,} kept, {_by_reason('pruned', plan.pruned)}, "
        f"{_by_reason('rejected', plan.rejected)}",
        soft_wrap=True,
    )
    if plan.threshold is not None:
        console.print(f"threshold: {config.select.by} >= {plan.threshold:.6g}", soft_wrap=True)
    if plan.shortfall:
        console.print(f"{plan.shortfall:,} fewer than asked for: no more can be kept")
    if plan.harmful_kept:
        console.print(f"{plan.harmful_kept:,} harmful ones are needed to meet the quota")
    judged = {name: found.to_dict() for name, found in judge_rankings(job).items()}
    for line in summary.ranking_lines(config, judged):
        console.print(f"wrong captions found by {line}", soft_wrap=True)
    if config.select.balance.by == "caption":
        _show_shares("caption", [(group.name, group.size, group.kept) for group in plan.groups], console)
    _show_shares("cluster", [(cluster.name, cluster.size, cluster.kept) for cluster in plan.clusters], console)
    _show_shares("source", [(source.name or NO_SOURCE, source.pairs, source.kept) for source in plan.sources], console)
    names = _short([shard.url for shard in plan.shards])
    _show_shares("shard", [(names[shard.url], shard.rows, shard.kept) for shard in plan.shards], console)


def _short(urls: list[str]) -> dict[str, str]:
    """Shards by their file names, where all of them lie in one folder."""
    one_folder = len({url.rpartition("/")[0] for url in urls}) == 1
    return {url: storage.basename(url) if one_folder else url for url in urls}


def _by_reason(fate: str, counts: dict[str, int]) -> str:
    """Such as `9 pruned (quota 7, where 2)`."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
    return f"{sum(counts.values()):,} {fate}" + (f" ({reasons})" if reasons else "")


def _show_shares(title: str, entries: list[tuple[str, int, int]], console: Console) -> None:
    if not entries:
        return
    table = Table(title=f"by {title}", title_justify="left", box=None)
    for heading in (title, "pairs", "kept", "share"):
        table.add_column(heading, justify="left" if heading == title else "right")
    for name, pairs, kept in entries[:LONGEST_TABLE]:
        table.add_row(text.plain(name), f"{pairs:,}", f"{kept:,}", text.percent(kept / pairs) if pairs else "")
    console.print(table)
    _count_rest(len(entries), console)


def _count_rest(entries: int, console: Console) -> None:
    if entries > LONGEST_TABLE:
        console.print(f"... and {entries - LONGEST_TABLE} more")


def show_comparison(root: str, first: str, second: str) -> None:
    """Print the overlap of two selections of a run, and where they differ most."""
    found = compare(RunFolder(root), first, second, map_tasks=thread_map)
    console = Console(markup=False, emoji=False)  # sources and shards have names of others' making
    names = _short([shard.name for shard in found.shards]) | {"": NO_SOURCE}
    for overlaps, title in (([found.overall], "all"), (found.sources, "source"), (found.shards, "shard")):
        table = Table(title=f"by {title}", title_justify="left", box=None)
        for heading in (title, "both", f"only {first}", f"only {second}", "shared"):
            table.add_column(heading, justify="left" if heading == title else "right")
        for overlap in overlaps[:LONGEST_TABLE]:
            counts = (f"{overlap.both:,}", f"{overlap.only_a:,}", f"{overlap.only_b:,}")
            table.add_row(text.plain(names.get(overlap.name, overlap.name)), *counts, text.percent(overlap.jaccard))
        console.print(table)
        _count_rest(len(overlaps), console)
    both, only_first, only_second = found.mean_utility
    console.print(f"rank correlation of the two rankings: {text.number(found.spearman)}")
    console.print(
        f"mean utility: both {text.number(both)}, only {first} {text.number(only_first)}, "
        f"only {second} {text.number(only_second)}"
    )
