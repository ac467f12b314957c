"""The tables of a validation: agreement with retraining, cleaning, deletion."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from pipeline import text
from pipeline.arrays import Float64
from pipeline.evaluation.agreement import Line, between_seeds
from pipeline.evaluation.by_runs import RunsLine
from pipeline.evaluation.correlation import Interval
from pipeline.evaluation.quality import Detection


def tables(
    lines: list[Line], runs: list[RunsLine], cleaning: dict[str, Detection], seeds: list[dict[str, Any]]
) -> list[Table | str]:
    """The tables that there is something for; `seeds` are the raw numbers of each seed."""
    found: list[Table | str] = [_left_out(lines), _halves(lines), _stability(seeds)]
    if len(seeds) > 1:
        agreement = between_seeds(np.array([seed["outcomes"] for seed in seeds]))
        found.append(
            f"outcomes of the halves in two seeds: rank correlation {agreement:.2f} (if low, nothing carries over)"
        )
    if runs:
        found.append(_by_runs(runs))
    if cleaning:
        found.append(_cleaning(cleaning, seeds))
    if deletions := [deletion for seed in seeds for deletion in seed.get("deletions", [])]:
        found.append(_deletions(deletions))
    return found


def _left_out(lines: list[Line]) -> Table:
    shown = _table(
        "rank correlation with leave-one-out (95 % intervals)",
        ("estimator", "passes", "same run", "in part", "another seed"),
    )
    for line in lines:
        passes = f"{text.number(line.directions, 2)} + {text.number(line.scoring, 2)}"
        found = (line.loo, line.loo_partial, line.loo_other)
        shown.add_row(line.estimator, passes, *(_interval(value) for value in found))
    return shown


def _halves(lines: list[Line]) -> Table:
    shown = _table(
        "rank correlation with training on random halves (LDS)",
        ("estimator", "same run", "behind unrolled", "another seed", "behind unrolled"),
    )
    for line in lines:
        found = (line.lds, line.behind, line.lds_other, line.behind_other)
        shown.add_row(line.estimator, *(_interval(value) for value in found))
    return shown


def _stability(seeds: list[dict[str, Any]]) -> str:
    limit = seeds[0]["stability_limit"]
    found = ", ".join(f"{seed['steepness']:.2f}" for seed in seeds)
    unstable = [str(number) for number, seed in enumerate(seeds) if seed["steepness"] > limit]
    verdict = "all stable"
    if unstable:
        verdict = f"past it in seed {', '.join(unstable)}, where no derivative predicts a removal: lower proxy.lr"
    return f"largest eta * lambda_max of each run: {found} (limit {limit:.3g}: {verdict})"


def _by_runs(lines: list[RunsLine]) -> Table:
    numbers = sorted({line.runs for line in lines})
    shown = _table(
        "utilities standardised and averaged over some of the runs: LDS in a seed that is not among them, and AUROC of "
        "low utility for wrong captions (± over the sets of runs, which overlap)",
        ("estimator", "", *(text.plural(number, "run") for number in numbers)),
    )
    for name in dict.fromkeys(line.estimator for line in lines):
        own = [line for line in lines if line.estimator == name]
        shown.add_row(name, "LDS", *(_spread(line.lds, line.lds_std) for line in own))
        if any(line.auroc is not None for line in own):
            shown.add_row("", "AUROC", *(_spread(line.auroc, line.auroc_std) for line in own))
    return shown


def _spread(mean: float | None, std: float | None, form: str = ".2f") -> str:
    """Mean and deviation as numbers of this form, whose sign is the mean's alone."""
    if mean is None:
        return ""
    return f"{mean:{form}}" if std is None else f"{mean:{form}} ± {std:{form.removeprefix('+')}}"


def _cleaning(cleaning: dict[str, Detection], seeds: list[dict[str, Any]]) -> Table:
    shown = _table(
        "wrong captions found by low utility; what training without as many suspects gives",
        ("estimator", "AUROC", "average precision", "precision", "target loss", "minus random"),
    )
    shown.caption = f"{sum(seeds[0]['wrong'])} of {seeds[0]['pairs']} pairs removed; losses in nats, ± over the seeds"
    chance = np.array([seed["cleaned"]["(random)"] for seed in seeds])
    for name in seeds[0]["cleaned"]:
        losses = np.array([seed["cleaned"][name] for seed in seeds])
        judged = cleaning.get(name)
        figures = () if judged is None else (judged.auroc, judged.average_precision, judged.precision)
        cells = [f"{value:.3f}" for value in figures] or [""] * 3
        gain = "" if name == "(random)" else _over_seeds(losses - chance, "+.4f")
        shown.add_row(name, *cells, _over_seeds(losses, ".4f"), gain)
    return shown


def _over_seeds(values: Float64, form: str) -> str:
    """Mean and standard deviation, which one seed has not."""
    return _spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, form)


def _deletions(found: list[dict[str, Any]]) -> Table:
    shown = _table(
        "deletion of a tenth, estimated",
        ("method", "correlation of predicted and true change", "remaining error", "remaining distance"),
    )
    shown.caption = "1 is what no estimate at all leaves"
    for method in dict.fromkeys(deletion["method"] for deletion in found):
        own = [deletion for deletion in found if deletion["method"] == method]
        both = np.array([[deletion["predicted"], deletion["true"]] for deletion in own])
        correlation = float(np.corrcoef(both.T)[0, 1]) if len(own) > 2 else float("nan")
        error = float(np.abs(both[:, 0] - both[:, 1]).mean() / np.abs(both[:, 1]).mean())
        distances = np.array([deletion["distance"] for deletion in own])
        shown.add_row(method, text.number(correlation, 2), f"{error:.3f}", f"{distances.mean():.3f}")
    return shown


def _table(title: str, headings: tuple[str, ...]) -> Table:
    shown = Table(title=title, title_justify="left", box=None)
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number else "left")
    return shown


def _interval(value: Interval | None) -> str:
    return "" if value is None else f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
