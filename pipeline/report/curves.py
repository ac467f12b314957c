"""Curves with spreads: a value against a size, one line for each way of choosing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.figures import WIDTH_WHEN_WIDE
from pipeline.report.plots import Canvas, Figure, draw
from pipeline.text import count, plus_minus

#: Least distance between the names at the ends of two lines, in the plot's units.
BETWEEN_NAMES = 15


@dataclass(frozen=True)
class Curve:
    """Points `(size, mean, standard deviation or NaN)` in ascending size; a single one is drawn as a level line."""

    name: str
    points: Sequence[tuple[int, float, float]]
    css: str = "kept"


def curve_figure(title: str, see: str, label: str, curves: Sequence[Curve]) -> Figure:
    """Lines through the means with whiskers of one standard deviation, each named at its end."""
    ends = [mean + sign * (std if math.isfinite(std) else 0.0) for c in curves for _, mean, std in c.points
            for sign in (-1, 1)]  # fmt: skip
    sizes = [size for curve in curves if len(curve.points) > 1 for size, _, _ in curve.points]
    margin = (max(ends) - min(ends)) * 0.06 or 0.05
    room = round(max(len(curve.name) for curve in curves) * WIDTH_WHEN_WIDE) + 16

    def drawing(canvas: Canvas) -> None:
        x = canvas.x_scale(min(sizes) - (max(sizes) - min(sizes)) * 0.04, max(sizes))
        y = canvas.y_scale(min(ends) - margin, max(ends) + margin)
        canvas.y_axis(y, label)
        canvas.x_axis(x, "pairs trained on")
        places = []
        for curve in curves:
            where = [(x(size), y(mean)) for size, mean, _ in curve.points]
            if len(where) == 1:
                canvas.line(canvas.left, where[0][1], canvas.right, where[0][1], "threshold")
            else:
                canvas.path("M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in where), f"curve {curve.css}-line")
                for (px, py), (size, mean, std) in zip(where, curve.points, strict=True):
                    if math.isfinite(std):
                        canvas.line(px, y(mean - std), px, y(mean + std), f"whisker {curve.css}-line")
                    note = f"{curve.name}, {count(size)} pairs: {plus_minus(mean, std)}"
                    canvas.circle(px, py, 4, curve.css, note)
            places.append((where[-1][1], curve))
        height = -math.inf
        for level, curve in sorted(places, key=lambda place: place[0]):
            height = max(level, height + BETWEEN_NAMES)
            canvas.text(canvas.right + 8, height + 4, curve.name, "strong" if curve.css == "kept" else "soft")

    description = "; ".join(
        f"{curve.name}: " + ", ".join(f"{mean:.3f} at {count(size)}" for size, mean, _ in curve.points)
        for curve in curves
    )
    return draw(
        title, see, f"{title}: {description}.", drawing,
        lambda: Canvas(960, 400, 62, room, 34, 46), lambda: Canvas(340, 300, 48, min(room, 130), 34, 46),
    )  # fmt: skip
