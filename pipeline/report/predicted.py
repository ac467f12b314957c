"""The section on scores that were predicted: how well they rank held-out pairs, by the share that was scored."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report.figures import Interval, interval_figure
from pipeline.report.plots import Figure
from pipeline.report.recorded import optional_json
from pipeline.run import RunFolder
from pipeline.text import count, number, percent


@dataclass(frozen=True)
class PredictedSection:
    """What was predicted by what, and the rank correlation on held-out pairs."""

    about: str
    figure: Figure


def predicted_section(run: RunFolder) -> PredictedSection | None:
    """The section from the regressor's mark; None where there is none."""
    mark = optional_json(run.regressor_mark)
    curve = mark.get("curve")
    if not curve:
        return None
    rows = [
        Interval(
            f"{percent(point['share'])} of all pairs",
            point["correlation"],
            point["low"],
            point["high"],
            f"{number(point['correlation'], 3)} from {count(point['pairs'])} pairs",
        )
        for point in curve
    ]
    last = curve[-1]
    about = (
        f"The scores of {count(mark['pairs'])} pairs were computed and a regression ({mark['kind']}) on their "
        "embeddings fitted to them; it predicted those of the others. Rows say which is which (column predicted)."
    )
    see = (
        "Rank correlation of predicted with computed scores on pairs that were not fitted on, by the share of all "
        f"pairs that is: {number(last['correlation'], 3)} at {percent(last['share'])}. Lines are 95\u202f% intervals; "
        "where the last points still rise, a larger score.sample would predict better."
    )
    return PredictedSection(about, interval_figure("Prediction of held-out scores", see, "rank correlation", rows))
