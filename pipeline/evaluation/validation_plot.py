"""The plot of a validation: each estimator's rank correlations with their intervals."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure, SubFigure

from pipeline.evaluation.agreement import Line
from pipeline.evaluation.by_runs import RunsLine

_PANELS = (
    ("loo", "leave-one-out, same run"),
    ("lds", "random halves (LDS), same run"),
    ("lds_other", "random halves (LDS), another seed"),
)


def plot(lines: Sequence[Line], runs: Sequence[RunsLine]) -> bytes:
    """An SVG: one panel per measure, with 95 % bootstrap intervals as bars; below, LDS against the number of runs."""
    height = 0.38 * len(lines) + 1.4
    figure = Figure(figsize=(11, height + 3.2 * bool(runs)), layout="constrained")
    upper, *lower = figure.subfigures(1 + bool(runs), 1, squeeze=False, height_ratios=[height, 3.2][: 1 + bool(runs)])[
        :, 0
    ]
    panels = upper.subplots(1, len(_PANELS), sharey=True)
    places = list(range(len(lines)))[::-1]
    for panel, (key, title) in zip(panels, _PANELS, strict=True):
        for place, line in zip(places, lines, strict=True):
            found = getattr(line, key)
            if found is None:
                continue
            panel.plot([found.low, found.high], [place, place], color="#4477aa", linewidth=2)
            panel.plot([found.value], [place], "o", color="#4477aa")
        panel.axvline(0, color="#999999", linewidth=0.8)
        panel.set(title=title, xlabel="Spearman", xlim=(-1.02, 1.02))
    panels[0].set_yticks(places, [line.estimator for line in lines])
    for part in lower:
        _against_runs(part, runs)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "diffprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _against_runs(figure: SubFigure, runs: Sequence[RunsLine]) -> None:
    known = [("lds", "LDS, a seed that is not among them")]
    if any(line.auroc is not None for line in runs):
        known.append(("auroc", "AUROC of low utility for wrong captions"))
    panels = figure.subplots(1, len(known), squeeze=False)[0]
    for panel, (key, title) in zip(panels, known, strict=True):
        for name in dict.fromkeys(line.estimator for line in runs):
            own = [line for line in runs if line.estimator == name]
            panel.plot(
                [line.runs for line in own],
                [math.nan if (value := getattr(line, key)) is None else value for line in own],
                "o-",
                label=name,
                markersize=4,
            )
        panel.set(title=title, xlabel="runs averaged")
        panel.set_xticks(sorted({line.runs for line in runs}))
    panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
