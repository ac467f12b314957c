"""The plot of a validation: each estimator's rank correlations with their intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from pipeline.evaluation.agreement import Line

_PANELS = (
    ("loo", "leave-one-out, same run"),
    ("lds_same", "random halves (LDS), same run"),
    ("lds", "random halves (LDS), all runs"),
)


def plot(lines: Sequence[Line]) -> bytes:
    """An SVG with one panel per measure; bars are 95 % bootstrap intervals."""
    figure = Figure(figsize=(11, 0.38 * len(lines) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    places = list(range(len(lines)))[::-1]
    for panel, (key, title) in zip(panels, _PANELS, strict=True):
        for place, line in zip(places, lines, strict=True):
            found = getattr(line, key)
            panel.plot([found.low, found.high], [place, place], color="#4477aa", linewidth=2)
            panel.plot([found.value], [place], "o", color="#4477aa")
        panel.axvline(0, color="#999999", linewidth=0.8)
        panel.set(title=title, xlabel="Spearman", xlim=(-1.02, 1.02))
    panels[0].set_yticks(places, [line.estimator for line in lines])
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "diffprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
