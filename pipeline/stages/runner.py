"""Runs the stages in order, or one of them; checks first what can be known to be wrong before any work."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from pipeline import text
from pipeline.config import Config
from pipeline.data.shards import expand
from pipeline.emit.emit import emit
from pipeline.engine.connect import alive_nodes, connect
from pipeline.errors import ConfigError, InputError, StageError
from pipeline.report.page import write_report
from pipeline.run import RunFolder
from pipeline.selection.compare import compare
from pipeline.selection.select import select
from pipeline.selection.summary import read_summary
from pipeline.selection.tasks import MapTasks, thread_map
from pipeline.stages import summary
from pipeline.stages.directions import compute_directions
from pipeline.stages.evaluating import evaluate
from pipeline.stages.job import Job, open_job
from pipeline.stages.mapping import ordered_map
from pipeline.stages.scoring import score
from pipeline.stages.training import check_checkpoints, check_held_out, take_inventory, train
from pipeline.stages.validating import validate
from pipeline.store import storage
from pipeline.store.commits import read_marks

#: Score files from which on a selection is shared out over the machines of a cluster.
WORTH_OTHER_MACHINES = 256

#: Rows of a table on the terminal; what comes after is counted.
LONGEST_TABLE = 20


def run_all(config: Config, *, retry_failed: bool = False) -> None:
    """All stages of a run; those that are complete are passed over. Ends with a table of what came out."""
    job = open_job(config)
    check(job)
    with connect(config.engine):
        summary.record_config(job)
        for stage in ("inventory", "train", "directions"):
            _run(job, stage)
        summary.record_config(job)
        with summary.timed(job, "score"):
            outcome = score(job, retry_failed=retry_failed)
        summary.note_scores(job, outcome)
        for stage in ("select", "emit"):
            _run(job, stage)
        results = []
        if config.evaluate is not None and config.evaluate.shards is not None:
            with summary.timed(job, "evaluate"):
                results = evaluate(job)
        _run(job, "report")
    summary.show(job, results)


def run_stage(name: str, config: Config, *, retry_failed: bool = False) -> None:
    """One stage; refuses with a `StageError` when the stage before it has not finished."""
    job = open_job(config)
    check(job)
    with connect(config.engine):
        if name == "score":
            with summary.timed(job, "score"):
                outcome = score(job, retry_failed=retry_failed)
            summary.note_scores(job, outcome)
        elif name == "evaluate":
            _require_scores(job)
            with summary.timed(job, "evaluate"):
                results = evaluate(job)
            summary.show(job, results)
        else:
            _run(job, name)


def _run(job: Job, stage: str) -> None:
    with summary.timed(job, stage):
        _STAGES[stage](job)


def _require_scores(job: Job) -> None:
    """Every shard is scored, but for the share that may fail."""
    done = len(list(read_marks(job.folder)))
    missing = len(job.inventory) - done
    if missing > job.config.engine.allowed_failures * len(job.inventory):
        raise StageError(f"{missing} of {len(job.inventory)} shards have no scores: run `diffprune score CONFIG` first")


def _select(job: Job) -> None:
    _require_scores(job)
    if not summary.selection_is_current(job):
        select(job.folder, job.config.select, seed=job.config.seed, map_tasks=_passes(job))
    summary.note_selection(job)
    chosen = read_summary(job.folder, job.config.select.name)
    _say("select", f"{chosen.kept:,} of {chosen.total:,} pairs kept")


def _passes(job: Job) -> MapTasks:
    """How the passes over the score files run: in threads; as Ray tasks where there are many and other machines."""
    if len(job.inventory) >= WORTH_OTHER_MACHINES and len(alive_nodes()) > 1:
        return ordered_map(job, "select", "parts", at_least=1)
    return thread_map


def _emit(job: Job) -> None:
    config = job.config
    done = emit(
        job.folder,
        config,
        job.inventory,
        map_tasks=ordered_map(job, "emit", "shards"),
        command=command_line(),
    )
    written = f"{done.tars:,} tars" if config.emit.materialize else "keep lists"
    _say("emit", f"{written} in {job.folder.selection(config.select.name)}")
    for warning in done.warnings:
        _say("emit", warning)


def command_line() -> str:
    """The command that this process runs, as one would type it again; "" where another program uses the library."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    if os.path.basename(sys.argv[0]) == "diffprune":
        start = ["diffprune"]
    elif module.partition(".")[0] in ("pipeline", "jobs"):
        start = ["python", "-m", module]
    else:
        return ""
    return shlex.join([*start, *sys.argv[1:]])


def _report(job: Job) -> None:
    _say("report", write_report(job.folder, job.config, selection=job.config.select.name))


def _say(stage: str, what: str) -> None:
    """One line for a stage that is over too soon for a progress bar."""
    Console(stderr=True).print(f"{stage}: {what}", markup=False, highlight=False, soft_wrap=True)


_STAGES: dict[str, Callable[[Job], None]] = {
    "inventory": take_inventory,
    "train": train,
    "directions": compute_directions,
    "select": _select,
    "emit": _emit,
    "report": _report,
    "validate": validate,
}


def check(job: Job) -> None:
    """What can be known to be wrong before any work is done. Raises `ConfigError`."""
    config = job.config
    expand(config.data.shards, "data.shards")
    if config.target.shards is not None:
        expand(config.target.shards, "target.shards")
    if config.evaluate is not None and config.evaluate.shards is not None:
        expand(config.evaluate.shards, "evaluate.shards")
    if config.evaluate is not None and config.evaluate.truth and not storage.exists(config.evaluate.truth):
        raise ConfigError("expected a CSV file", key="evaluate.truth", found=config.evaluate.truth)
    check_checkpoints(config)
    check_held_out(config)
    try:
        job.model()
    except InputError as error:
        raise ConfigError(str(error), key="proxy.model") from None


def show_plan(config: Config) -> None:
    """Print what a selection would keep; write nothing."""
    job = open_job(config)
    _require_scores(job)
    plan = select(job.folder, config.select, seed=config.seed, dry_run=True, map_tasks=thread_map)
    console = Console()
    console.print(
        f"{plan.total:,} pairs: {plan.kept:,} kept, {_by_reason('pruned', plan.pruned)}, "
        f"{_by_reason('rejected', plan.rejected)}",
        soft_wrap=True,
    )
    if plan.threshold is not None:
        console.print(f"threshold: {config.select.by} >= {plan.threshold:.6g}", markup=False, soft_wrap=True)
    if plan.shortfall:
        console.print(f"{plan.shortfall:,} fewer than asked for: no more can be kept")
    if plan.harmful_kept:
        console.print(f"{plan.harmful_kept:,} harmful ones are needed to meet the quota")
    if config.select.balance.by == "caption":
        _show_shares("caption", [(group.name, group.size, group.kept) for group in plan.groups], console)
    _show_shares("cluster", [(cluster.name, cluster.size, cluster.kept) for cluster in plan.clusters], console)
    _show_shares(
        "source", [(source.name or "(unknown)", source.pairs, source.kept) for source in plan.sources], console
    )
    _show_shares("shard", [(shard.url, shard.rows, shard.kept) for shard in plan.shards], console)


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
        table.add_row(name, f"{pairs:,}", f"{kept:,}", text.percent(kept / pairs) if pairs else "")
    console.print(table)
    if len(entries) > LONGEST_TABLE:
        console.print(f"... and {len(entries) - LONGEST_TABLE} more")


def show_comparison(root: str, first: str, second: str) -> None:
    """Print the overlap of two selections of a run, and where they differ most."""
    found = compare(RunFolder(root), first, second, map_tasks=thread_map)
    console = Console()
    for overlaps, title in (([found.overall], "all"), (found.sources, "source"), (found.shards, "shard")):
        table = Table(title=f"by {title}", title_justify="left", box=None)
        for heading in (title, "both", f"only {first}", f"only {second}", "shared"):
            table.add_column(heading, justify="left" if heading == title else "right")
        for overlap in overlaps[:LONGEST_TABLE]:
            counts = (f"{overlap.both:,}", f"{overlap.only_a:,}", f"{overlap.only_b:,}")
            table.add_row(overlap.name, *counts, text.percent(overlap.jaccard))
        console.print(table)
    both, only_first, only_second = found.mean_utility
    console.print(f"rank correlation of the two rankings: {found.spearman:.3f}")
    console.print(f"mean utility: both {both:.4g}, only {first} {only_first:.4g}, only {second} {only_second:.4g}")
