"""Hand-made SVG: axes, bars, cells and intervals, coloured by the page's own style so that both schemes fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from pipeline.text import MINUS, power_of_ten


@dataclass(frozen=True)
class Scale:
    """A linear axis: data from `low` to `high`, drawn from `start` to `end` pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value, held within the axis."""
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Round values within the axis, roughly `about` of them."""
        raw = (self.high - self.low) / max(about, 1)
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> tuple[list[str], str]:
    """Labels of an axis and the power of ten they share (empty when none is needed)."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest else 0
    exponent = exponent if exponent < -2 or exponent > 4 else 0
    scaled = [tick / 10.0**exponent for tick in ticks]
    step = min((b - a for a, b in pairwise(scaled)), default=1.0)
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if any(abs(value * 10**places - round(value * 10**places)) > 1e-6 for value in scaled):
        places += 1
    labels = [f"{value:,.{places}f}".replace("-", MINUS) for value in scaled]
    labels = [label.lstrip(MINUS) if not label.strip(MINUS + "0.") else label for label in labels]
    return labels, f"\u00d7 {power_of_ten(exponent)}" if exponent else ""


class Canvas:
    """An SVG being drawn, `width` x `height` units, with a plotting area inside the margins."""

    def __init__(self, width: int, height: int, left: int, right: int, top: int, bottom: int) -> None:
        self.width, self.height = width, height
        self.left, self.right = left, width - right
        self.top, self.bottom = top, height - bottom
        self.narrow = width < 420
        self.parts: list[str] = []

    def x_scale(self, low: float, high: float) -> Scale:
        """Data to the horizontal extent of the plotting area."""
        return Scale(low, high, self.left, self.right)

    def y_scale(self, low: float, high: float) -> Scale:
        """Data to the vertical extent of the plotting area, upwards."""
        return Scale(low, high, self.bottom, self.top)

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        """A filled box; `title` appears on hovering."""
        inner = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="{css}">'
            f"{inner}</rect>"
        )

    def path(self, data: str, css: str) -> None:
        """Any path."""
        self.parts.append(f'<path d="{data}" class="{css}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self.path(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", css)

    def circle(self, x: float, y: float, radius: float, css: str, title: str = "") -> None:
        """A dot; `title` appears on hovering."""
        inner = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}">{inner}</circle>')

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        """Text, at most one line."""
        style = f' class="{css}"' if css else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>')

    def x_axis(self, scale: Scale, label: str, grid: bool = False) -> None:
        """Ticks, numbers and label below the plotting area."""
        ticks = scale.ticks(4 if self.narrow else 7)
        labels, factor = tick_labels(ticks)
        for tick, text in zip(ticks, labels, strict=True):
            if grid:
                self.line(scale(tick), self.top, scale(tick), self.bottom, "grid")
            self.line(scale(tick), self.bottom, scale(tick), self.bottom + 4, "tick")
            self.text(scale(tick), self.bottom + 18, text, anchor="middle")
        self.line(self.left, self.bottom, self.right, self.bottom, "axis")
        title = f"{label} ({factor})" if factor else label
        self.text((self.left + self.right) / 2, self.bottom + 38, title, "label", "middle")

    def y_axis(self, scale: Scale, label: str) -> None:
        """Gridlines, numbers left of the plotting area, and the label above it, where it needs no turning."""
        ticks = scale.ticks(5)
        labels, factor = tick_labels(ticks)
        for tick, text in zip(ticks, labels, strict=True):
            self.line(self.left, scale(tick), self.right, scale(tick), "grid")
            self.text(self.left - 8, scale(tick) + 4, text, anchor="end")
        self.text(2, 13, f"{label} ({factor})" if factor else label, "label")

    def markup(self, description: str, css: str) -> Markup:
        """The finished picture; `description` is read out in its place."""
        return Markup(
            f'<svg class="{css}" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(description)}">{"".join(self.parts)}</svg>'
        )


@dataclass(frozen=True)
class Figure:
    """A plot in a wide and a narrow drawing, with its title and the sentence that says what to see in it."""

    title: str
    see: str
    wide: Markup
    narrow: Markup
    legend: tuple[tuple[str, str], ...] = ()


def draw(
    title: str,
    see: str,
    description: str,
    drawing: Callable[[Canvas], None],
    wide: Callable[[], Canvas],
    narrow: Callable[[], Canvas],
    legend: tuple[tuple[str, str], ...] = (),
) -> Figure:
    """Make a figure by running `drawing` on both canvases; `legend` pairs a colour class with a word."""
    pictures = []
    for make, css in ((wide, "wide"), (narrow, "narrow")):
        canvas = make()
        drawing(canvas)
        pictures.append(canvas.markup(description, css))
    return Figure(title, see, pictures[0], pictures[1], legend)
