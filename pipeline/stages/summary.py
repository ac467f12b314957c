"""What a run says of itself when it ends: `summary.json`, and the table on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pipeline import text
from pipeline.config import Config
from pipeline.emit.summary import account
from pipeline.engine.outcome import Outcome
from pipeline.evaluation.results import Result
from pipeline.run import RunFolder
from pipeline.selection.scan import input_fingerprint
from pipeline.selection.summary import read_summary, summary_file
from pipeline.stages.job import Job
from pipeline.stages.judging import judge, judged_from
from pipeline.store import storage
from pipeline.store.commits import read_marks


@contextmanager
def timed(job: Job, stage: str) -> Iterator[None]:
    """Note the seconds of the block in `summary.json`: the longest so far, as one that finds a stage done is short."""
    start = time.monotonic()
    yield
    seconds = round(time.monotonic() - start, 2)
    taken = _read(job).get("seconds", {})
    _note(job, {"seconds": {**taken, stage: max(seconds, taken.get(stage, 0.0))}})


def _note(job: Job, values: dict[str, Any]) -> None:
    """Put values into `summary.json`, in place of earlier ones of the same name; None takes those away."""
    noted = {name: value for name, value in {**_read(job), **values}.items() if value is not None}
    storage.write_json(job.folder.summary, noted)


def _read(job: Job) -> dict[str, Any]:
    if not storage.exists(job.folder.summary):
        return {}
    value = storage.read_json(job.folder.summary)
    return value if isinstance(value, dict) else {}


def note_scores(job: Job, outcome: Outcome) -> None:
    """Note counts of the scoring: shards, failed ones, pairs by reason of rejection, throughput."""
    rows, reasons, seconds = 0, dict[str, int](), dict[str, float]()
    shards = 0
    for mark in read_marks(job.folder):
        shards += 1
        rows += mark.rows
        for reason, count in mark.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        _add(seconds, mark.seconds)
    predicted = {}
    if job.config.score.sample < 1:
        for mark in read_marks(RunFolder(job.folder.sample)):
            _add(seconds, mark.seconds)
        found = storage.read_json(job.folder.regressor_mark)
        predicted = {"predicted": {"sample": job.config.score.sample, "kind": found["kind"], **found["curve"][-1]}}
    failed = [str(aside) for aside in outcome.failed]
    busy = seconds.get("score", 0.0)
    _note(
        job,
        {
            "scores": {
                "shards": len(job.inventory),
                "scored_shards": shards,
                "failed_shards": failed,
                "pairs": rows,
                "rejected": sum(reasons.values()),
                "rejected_by_reason": dict(sorted(reasons.items())),
                "worker_seconds": {phase: round(value, 2) for phase, value in sorted(seconds.items())},
                "pairs_per_worker_second": round(rows / busy, 1) if busy else None,
                **predicted,
            }
        },
    )


def _add(seconds: dict[str, float], more: dict[str, float]) -> None:
    for phase, value in more.items():
        seconds[phase] = seconds.get(phase, 0.0) + value


def note_selection(job: Job) -> None:
    """Note the counts of the selection, and how well it found the wrong captions where the truth is known."""
    counts = account(read_summary(job.folder, job.config.select.name))
    judged = judge(job)
    if judged is None:
        _note(job, {"counts": counts, "quality": None})
        return
    quality = {
        "judged_from": judged_from(job),
        "auroc": judged.by["utility"].auroc,
        "precision": judged.wrong / judged.pruned if judged.pruned else None,
        "base_rate": judged.by["utility"].base_rate,
        "by": {name: found.to_dict() for name, found in judged.by.items()},
    }
    _note(job, {"counts": counts, "quality": storage.without_nan(quality)})


def speak_of_selection(job: Job) -> None:
    """Note this job's selection again where the summary is about another one, or judged it by something else."""
    name = job.config.select.name
    if not storage.exists(summary_file(job.folder, name)):
        return
    noted = _read(job)
    spoken_of, judged = noted.get("counts", {}).get("selection"), noted.get("quality", {}).get("judged_from")
    if spoken_of != name or judged != judged_from(job):
        note_selection(job)


def show(job: Job, results: list[Result], console: Console | None = None) -> None:
    """Print the table that a run ends with."""
    console = console or Console(markup=False, emoji=False)  # errors and paths may look like either
    speak_of_selection(job)
    summary = _read(job)
    table = Table(Column(), Column(overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
    counts = summary["counts"]
    rejected = counts["rejected"]
    table.add_row(
        "pairs", f"{counts['in']:,} in, {counts['kept']:,} kept, {counts['pruned']:,} pruned, {rejected:,} rejected"
    )
    if failed := summary.get("scores", {}).get("failed_shards"):
        table.add_row("failed shards", f"{len(failed)} (allowed by engine.allowed_failures): {'; '.join(failed[:3])}")
    if predicted := summary.get("scores", {}).get("predicted"):
        table.add_row(
            "scores",
            f"{text.percent(predicted['sample'])} computed, the others predicted "
            f"(rank correlation {predicted['correlation']:.3f} on held-out pairs)",
        )
    _add_quality(table, job, summary)
    _add_results(table, results)
    seconds = summary["seconds"]
    table.add_row("time", ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items()))
    folder = job.folder.selection(job.config.select.name)
    table.add_row("kept pairs", folder)
    table.add_row("train on them", storage.join(folder, "train.sh"))
    table.add_row("report", job.folder.report)
    console.print(table)


def _add_quality(table: Table, job: Job, summary: dict[str, Any]) -> None:
    quality = summary.get("quality")
    if not quality:
        return
    table.add_row("wrong captions", _wrong_among_pruned(quality))
    for place, line in enumerate(ranking_lines(job.config, quality["by"])):
        table.add_row("found by" if place == 0 else "", line)


def _wrong_among_pruned(quality: dict[str, Any]) -> str:
    return f"{text.percent(quality['precision'])} of the pruned are wrong, {text.percent(quality['base_rate'])} of all"


def ranking_lines(config: Config, by: dict[str, dict[str, Any]]) -> list[str]:
    """How well each ranking finds the wrong captions, by the names in `Judgement.by`; every ranking once."""
    names = {"utility": config.score.estimator, "select": config.select.by}
    return [
        f"{names.get(name, name)}: AUROC {_rounded(found['auroc'])}, "
        f"average precision {_rounded(found['average_precision'])}, "
        f"precision {_rounded(found['precision'])} at the true number"
        for name, found in by.items()
        if not (name == "select" and config.select.by in by)
    ]


def quality_lines(job: Job) -> list[str]:
    """What was noted of the selection and its rankings; nothing where no truth is known."""
    quality = _read(job).get("quality")
    if not quality:
        return []
    return [f"wrong captions: {_wrong_among_pruned(quality)}", *ranking_lines(job.config, quality["by"])]


def _rounded(value: float | None) -> str:
    return text.number(None) if value is None else f"{value:.3f}"


def _add_results(table: Table, results: list[Result]) -> None:
    for place, result in enumerate(sorted(results, key=lambda result: -result.mean)):
        spread = "" if result.std != result.std else f" ± {result.std:.3f}"
        table.add_row(
            result.metric if place == 0 else "",
            f"{result.mean:.3f}{spread}  {result.set} ({result.size:,} pairs, {text.plural(result.seeds, 'seed')})",
        )
    kept = [result for result in results if result.series == "kept"]
    for mine in kept:
        name = "what was kept" if len(kept) == 1 else mine.set
        for other in results:
            # Of a curve, sets of the same share; what has a size of its own (everything) stands beside each.
            if other.series != "kept" and other.share in (mine.share, None):
                _add_verdict(table, name, mine, other)


def _add_verdict(table: Table, name: str, mine: Result, other: Result) -> None:
    if min(mine.seeds, other.seeds) < 2:  # one seed has no spread, so there is no verdict
        return
    gap = mine.mean - other.mean
    how = "like {}, within noise" if not mine.differs_from(other) else "better than {}" if gap > 0 else "worse than {}"
    table.add_row("", f"{name} trains {how.format(other.set)} ({gap:+.3f})")


def selection_is_current(job: Job) -> bool:
    """Whether the selection on storage was made from the present scores with the present settings."""
    if not storage.exists(summary_file(job.folder, job.config.select.name)):
        return False
    done = read_summary(job.folder, job.config.select.name)
    return (
        done.config == job.config.select.model_dump(mode="json")
        and done.seed == job.config.seed
        and done.scores == input_fingerprint(job.folder, job.config.select.join)
    )
