"""The section on models trained from what was kept and from the baselines, where there are results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.config import Config
from pipeline.data.shards import also_measured_on
from pipeline.errors import DiffpruneError
from pipeline.evaluation.results import Result
from pipeline.report.curves import Curve, curve_figure
from pipeline.report.figures import Interval, interval_figure
from pipeline.report.plots import Figure
from pipeline.report.tables import Table
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.text import count, number, plain, plus_minus

#: The series of what the selection itself keeps, rather than a baseline or another choice.
OURS = "kept"


@dataclass(frozen=True)
class EvaluationSection:
    """What was trained and measured on, a plot per metric, and all numbers."""

    about: str
    figures: list[Figure]
    table: Table


def read_results(run: RunFolder) -> list[Result]:
    """The rows of `evaluation/results.json` that have a mean; none where models were not trained."""
    try:
        rows = storage.read_json(storage.join(run.root, "evaluation", "results.json"))["rows"]
    except FileNotFoundError:
        return []
    return [_result(row) for row in rows if row["mean"] is not None]


def _result(row: dict[str, Any]) -> Result:
    names = {name: plain(row[name], 60) for name in ("set", "series", "metric")}
    return Result(**{**row, **names, "std": math.nan if row["std"] is None else row["std"]})


def evaluation_section(results: list[Result], config: Config) -> EvaluationSection:
    """Compare the sets by each metric."""
    by_metric = sorted(results, key=lambda result: result.metric)
    metrics = {metric: list(rows) for metric, rows in groupby(by_metric, key=lambda result: result.metric)}
    figures = [figure for metric, rows in metrics.items() for figure in (*_curves(metric, rows), _figure(metric, rows))]
    several = len(metrics) > 1
    rows = [
        (
            f"{result.set}, {result.metric}" if several else result.set,
            count(result.size),
            plus_minus(result.mean, result.std),
            count(result.seeds),
        )
        for result in results
    ]
    heads = ("set", "pairs", "mean \u00b1 standard deviation", "seeds")
    table = Table("Models trained on each set", heads, rows, frozenset({1, 2, 3}))
    return EvaluationSection(_about(config), figures, table)


def _about(config: Config) -> str:
    start = "from scratch" if config.proxy.pretrained is None else "from the weights of proxy.pretrained"
    return f"Models trained {start} on each set for the same number of steps{_measured_on(config)}."


def _measured_on(config: Config) -> str:
    """Whether other pairs were measured on than were used; nothing where the shards can no longer be told."""
    if config.evaluate is None:
        return ""
    try:
        shared = also_measured_on(config)
    except (OSError, DiffpruneError):
        return ""
    if not shared:
        return ", measured on shards that nothing else has used"
    named = " and ".join(f"{count(len(urls))} also named by {key}" for key, urls in shared.items())
    return f", measured on evaluate.shards ({named}): unused pairs would not give these numbers"


def _curves(metric: str, rows: list[Result]) -> list[Figure]:
    """The coreset curve, where something was trained at several sizes."""
    series: dict[str, list[Result]] = {}
    for row in sorted(rows, key=lambda row: row.size):
        series.setdefault(row.series, []).append(row)
    if max(len({row.size for row in points}) for points in series.values()) < 2:
        return []
    curves = [
        Curve(
            name if len(points) > 1 else points[0].set,
            [(row.size, row.mean, row.std) for row in points],
            "kept" if name == OURS else "rejected",
        )
        for name, points in series.items()
    ]
    see = "Whiskers are one standard deviation over the seeds; broken lines are sets of one size."
    return [curve_figure(f"{metric[:1].upper() + metric[1:]} by pairs kept", see, metric, curves)]


def _figure(metric: str, rows: list[Result]) -> Figure:
    # A loss is better the lower it is; every other metric the higher.
    better = -1 if "loss" in metric.lower() else 1
    rows = sorted(rows, key=lambda row: -better * row.mean)
    intervals = []
    for row in rows:
        spread = row.std if math.isfinite(row.std) else 0.0
        note = f"{plus_minus(row.mean, row.std)}, {count(row.size)} pairs"
        css = "kept" if row.series == OURS else "rejected"
        intervals.append(Interval(row.set, row.mean, row.mean - spread, row.mean + spread, note, css))
    see = f"{rows[0].set} comes out best"
    if len(rows) > 1:
        ahead = "ahead of" if rows[0].differs_from(rows[1]) else "not clearly ahead of"
        see += f", {ahead} {rows[1].set}: they differ by {number(abs(rows[0].mean - rows[1].mean), 2)}"
    see += ". Whiskers are one standard deviation over the seeds."
    return interval_figure(
        metric[:1].upper() + metric[1:], see, f"{metric}, {'lower' if better < 0 else 'higher'} is better", intervals
    )
