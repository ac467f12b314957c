"""The figures of the page: each with axes, units and a sentence, made from the numbers, that says what to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from pipeline.report.collect import Cut, Density, Findings, Histogram
from pipeline.report.plots import Canvas, Figure, Scale, draw
from pipeline.report.rows import Floats
from pipeline.text import count, number, percent, plural

#: Steps of darkness of the density plots; the style sheet has one class for each.
SHADES = 7
#: Rough width of a letter in the plots' type, in their units.
WIDTH_OF_LETTER = 6.7
#: The same in the wide drawings, whose type is larger where the page is narrower than they are (see the style sheet).
WIDTH_WHEN_WIDE = 7.8


def utility_figure(histogram: Histogram, cut: Cut) -> Figure:
    """How utility is distributed over the scored pairs, kept and pruned, with the threshold."""
    kept, pruned = int(histogram.kept.sum()), int(histogram.pruned.sum())
    stacked = histogram.kept + histogram.pruned
    edges = histogram.edges

    def drawing(canvas: Canvas) -> None:
        x = canvas.x_scale(float(edges[0]), float(edges[-1]))
        y = canvas.y_scale(0, float(stacked.max()) * 1.06)
        canvas.y_axis(y, "pairs per bin")
        for low, high, keeps, drops in zip(edges, edges[1:], histogram.kept, histogram.pruned, strict=False):
            left, right = x(float(low)), x(float(high))
            title = f"utility {number(float(low))} to {number(float(high))}: {count(keeps)} kept, {count(drops)} pruned"
            gap = 0.6 if right - left > 3 else 0.0
            middle = y(float(keeps))
            canvas.rect(left, middle, right - left - gap, canvas.bottom - middle, "kept", title)
            canvas.rect(left, y(float(keeps + drops)), right - left - gap, middle - y(float(keeps + drops)),
                        "pruned", title)  # fmt: skip
        if edges[0] < 0 < edges[-1]:
            canvas.line(x(0), canvas.top, x(0), canvas.bottom, "zero")
        if cut.sharp:
            position = x(cut.centre)
            canvas.line(position, canvas.top - 6, position, canvas.bottom, "threshold")
            left_half = position < (canvas.left + canvas.right) / 2
            canvas.text(position + (6 if left_half else -6), canvas.top + 4, f"threshold {number(cut.centre)}",
                        "strong", "start" if left_half else "end")  # fmt: skip
        canvas.x_axis(x, "utility, higher = keep")

    if cut.sharp:
        see = f"Everything at or right of the line, at {number(cut.centre)}, is kept."
    elif kept and pruned:
        see = (
            "Kept and pruned pairs overlap: more than the value of utility decided (quotas, conditions, duplicates "
            "or ties), so there is no single threshold."
        )
    else:
        see = "All scored pairs are kept." if kept else "No pair is kept."
    if histogram.beyond:
        see += f" {plural(histogram.beyond, 'pair')} beyond the ends of the axis stand in the outermost bins."
    return draw(
        "Utility of the scored pairs", see,
        f"Histogram of utility: {count(kept)} kept and {count(pruned)} pruned pairs.", drawing,
        lambda: Canvas(960, 330, 62, 14, 34, 46), lambda: Canvas(340, 270, 48, 8, 34, 46),
        (("kept", "kept"), ("pruned", "pruned")),
    )  # fmt: skip


def density_figure(name: str, unit: str, density: Density, found: Findings) -> Figure:
    """Utility against another value as a binned density, with the running median."""
    sample = found.sample
    value, utility = sample[name], sample["utility"]
    finite = np.isfinite(value)
    correlation = spearman(np.column_stack([value[finite], utility[finite]]))[0, 1]
    medians = _running_median(value[finite], utility[finite], density.x_edges)
    largest = max(int(density.counts.max()), 1)

    def drawing(canvas: Canvas) -> None:
        x = canvas.x_scale(float(density.x_edges[0]), float(density.x_edges[-1]))
        y = canvas.y_scale(float(density.y_edges[0]), float(density.y_edges[-1]))
        canvas.y_axis(y, "utility")
        for shade in range(SHADES):
            cells = _cells(density, shade, largest, x, y)
            if cells:
                canvas.path(cells, f"density d{shade}")
        if found.cut.sharp:
            canvas.line(canvas.left, y(found.cut.centre), canvas.right, y(found.cut.centre), "threshold")
        points = [f"{x(px):.1f} {y(py):.1f}" for px, py in medians]
        if len(points) > 1:
            canvas.path("M" + "L".join(points), "halo")
            canvas.path("M" + "L".join(points), "median")
        canvas.x_axis(x, f"{name}, {unit}")

    see = (
        f"{_tendency(name, correlation)} (rank correlation {_correlation(correlation, int(finite.sum()))}). "
        f"The line is the median utility; the darkest cells hold {plural(largest, 'pair')}, each shade about "
        f"{_shade_factor(largest)} times as many as the one before."
    )
    legend: tuple[tuple[str, str], ...] = (("median", "median utility"),)
    if found.cut.sharp:
        legend += (("threshold", "threshold"),)
    return draw(
        f"Utility against {name}", see,
        f"Density of pairs over {name} and utility, rank correlation {correlation:.2f}.", drawing,
        lambda: Canvas(480, 360, 54, 10, 28, 46), lambda: Canvas(340, 290, 48, 8, 28, 46), legend,
    )  # fmt: skip


def _tendency(name: str, correlation: float) -> str:
    if not math.isfinite(correlation) or abs(correlation) < 0.1:
        return f"Utility hardly depends on {name}: it says something that {name} alone does not"
    strength = "clearly" if abs(correlation) > 0.5 else "somewhat"
    return f"Utility {'rises' if correlation > 0 else 'falls'} {strength} with {name}"


def _shade_factor(largest: int) -> str:
    return number(max(float(largest) ** (1 / SHADES), 1.0), 2)


def _cells(density: Density, shade: int, largest: int, x: Scale, y: Scale) -> str:
    """One path of all cells of a shade; cells of a row that touch become one box."""
    level = np.full(density.counts.shape, -1)
    filled = density.counts > 0
    top = math.log(largest + 1)
    level[filled] = np.minimum((np.log(density.counts[filled]) / top * SHADES).astype(int), SHADES - 1)
    boxes = []
    for row in range(len(density.y_edges) - 1):
        bottom, upper = y(float(density.y_edges[row])), y(float(density.y_edges[row + 1]))
        run = np.flatnonzero(np.diff(np.concatenate(([0], (level[:, row] == shade).astype(int), [0]))))
        for start, end in run.reshape(-1, 2):
            left, right = x(float(density.x_edges[start])), x(float(density.x_edges[end]))
            boxes.append(f"M{left:.1f} {upper:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}Z")
    return "".join(boxes)


def _running_median(x: Floats, y: Floats, edges: Floats, groups: int = 16) -> list[tuple[float, float]]:
    """Median of `y` in wide bins of `x` that hold at least 10 pairs."""
    borders = np.linspace(edges[0], edges[-1], groups + 1)
    place = np.digitize(x, borders[1:-1])
    return [
        (float((borders[group] + borders[group + 1]) / 2), float(np.median(y[place == group])))
        for group in range(groups)
        if int((place == group).sum()) >= 10
    ]


def spearman(values: Floats) -> Floats:
    """Rank correlations of the columns of `values [n, m]`, `[m, m]`; NaN for a constant column.

    Where values are missing (terms that do not count), of the rows that two columns share.
    """
    if np.isnan(values).any():
        return _spearman_by_twos(values)
    if len(values) < 3:
        return np.full((values.shape[1],) * 2, np.nan)
    ranks = np.column_stack([rankdata(column) for column in values.T])
    ranks -= ranks.mean(axis=0)
    norms = np.sqrt((ranks**2).sum(axis=0))
    norms[norms == 0] = np.nan
    correlations: Floats = (ranks.T @ ranks) / norms[:, None] / norms[None, :]
    return correlations


def _spearman_by_twos(values: Floats) -> Floats:
    known = np.isfinite(values)
    found = np.full((values.shape[1],) * 2, np.nan)
    for i, j in np.ndindex(found.shape):
        found[i, j] = spearman(values[known[:, i] & known[:, j]][:, [i, j]])[0, 1]
    return found


def _correlation(value: float, pairs: int) -> str:
    """A rank correlation with its 95\u202f% interval (Fisher's transform; factor 1.06 for ranks)."""
    if not math.isfinite(value) or pairs < 5:
        return number(value, 2)
    middle = math.atanh(min(max(value, -0.999999), 0.999999))
    half = 1.96 * math.sqrt(1.06 / (pairs - 3))
    return f"{number(value, 2)}, 95\u202f% interval {number(math.tanh(middle - half), 2)} to " + number(
        math.tanh(middle + half), 2
    )


def variance_shares(terms: Floats) -> Floats:
    """Share of each checkpoint's term in the variance of the score, `cov(term, score) / var(score)`; sums to 1."""
    terms = np.nan_to_num(terms)  # what does not count adds nothing to the score
    score = terms.sum(axis=1)
    centred = score - score.mean()
    variance = float(centred @ centred)
    if variance == 0:
        return np.full(terms.shape[1], np.nan)
    shares: Floats = (terms - terms.mean(axis=0)).T @ centred / variance
    return shares


def correlation_label(value: float, room: float) -> str:
    """A correlation in a cell that is `room` pixels wide: `0.74`, or `.7` where that is too long."""
    if not math.isfinite(value):
        return ""
    text = f"{value:.2f}" if room >= 40 else f"{value:.1f}".replace("0.", ".").replace("1.0", "1")
    return {"-.0": "0", ".0": "0", "-0.00": "0.00"}.get(text, text).replace("-", "\u2212")


def agreement_figures(terms: Floats, names: Sequence[str]) -> tuple[Figure, Figure]:
    """Rank correlations between the checkpoints' terms, and each one's share in the variance of the score."""
    correlations, shares = spearman(terms), variance_shares(terms)
    number_of = len(names)
    pairs = len(terms)
    off = correlations[~np.eye(number_of, dtype=bool)]
    mean = float(np.nanmean(off)) if np.isfinite(off).any() else float("nan")
    row = 30 if number_of <= 14 else max(10, 420 // number_of)

    def matrix(canvas: Canvas) -> None:
        step = min((canvas.right - canvas.left) / number_of, float(row) * 2.5)
        height = (canvas.bottom - canvas.top) / number_of
        for i in range(number_of):
            middle = canvas.top + (i + 0.5) * height + 4
            if height >= 12:
                canvas.text(canvas.left - 10, middle, f"{names[i]} \u00b7 {i + 1}", anchor="end")
            canvas.text(canvas.left + (i + 0.5) * step, canvas.bottom + 16, str(i + 1), anchor="middle")
            for j in range(number_of):
                value = float(correlations[i, j])
                shade = 0 if not math.isfinite(value) else min(int(abs(value) * SHADES), SHADES - 1)
                css = f"{'cell' if not value < 0 else 'cell negative'} d{shade}"
                canvas.rect(canvas.left + j * step, canvas.top + i * height, step - 1.5, height - 1.5, css,
                            f"checkpoints {i + 1} and {j + 1}: {number(value, 2)}")  # fmt: skip
                if step >= 24 and height >= 16:
                    canvas.text(canvas.left + (j + 0.5) * step - 0.75, middle, correlation_label(value, step),
                                "on-dark" if shade >= 5 else "on-light", "middle")  # fmt: skip
        canvas.text(canvas.left + number_of * step / 2, canvas.bottom + 38, "checkpoint", "label", "middle")

    def bars(canvas: Canvas) -> None:
        finite = shares[np.isfinite(shares)]
        low, high = min(0.0, float(finite.min(initial=0))), max(1e-9, float(finite.max(initial=1e-9)))
        x = canvas.x_scale(100 * low, 100 * high * (1.4 if canvas.narrow else 1.18))
        height = (canvas.bottom - canvas.top) / number_of
        for i, share in enumerate(shares.tolist()):
            middle = canvas.top + (i + 0.5) * height
            if height >= 12:
                canvas.text(canvas.left - 10, middle + 4, f"{names[i]} \u00b7 {i + 1}", anchor="end")
            if math.isfinite(share):
                start, end = sorted((x(0), x(100 * share)))
                canvas.rect(start, canvas.top + i * height + 1, end - start, height - 4, "kept",
                            f"checkpoint {i + 1}: {percent(share)}")  # fmt: skip
                canvas.text(end + 5, middle + 4, percent(share))
        canvas.line(x(0), canvas.top, x(0), canvas.bottom, "axis")
        canvas.x_axis(x, "share of the score's variance, %")

    extra = number_of * row + 54
    margin = min(round(max(len(name) for name in names) * WIDTH_OF_LETTER) + 40, 170)
    agree = (
        "they rank the pairs much alike" if mean > 0.6 else "they agree in part" if mean > 0.2 else
        "they see different pairs as helpful, so a single one would be mostly noise"
    )  # fmt: skip
    first = draw(
        "Agreement between checkpoints",
        f"Mean rank correlation of the terms {number(mean, 2)}: {agree}. From {plural(pairs, 'drawn pair')}; "
        f"standard error about {number(1.03 / math.sqrt(max(pairs - 1, 1)), 1)}.",
        f"Matrix of rank correlations between {number_of} checkpoints, mean {mean:.2f}.",
        matrix, lambda: Canvas(480, extra, margin, 6, 8, 46), lambda: Canvas(340, extra, margin, 4, 8, 46),
    )  # fmt: skip
    known = np.nan_to_num(shares, nan=-np.inf)
    leading = int(np.argmax(known))
    second = draw(
        "Which checkpoints carry the score",
        f"Checkpoint {leading + 1} ({names[leading]}) carries {percent(float(shares[leading]))} of the score's "
        f"variance; equal shares would be {percent(1 / number_of)} each. A negative share pulls against the rest.",
        f"Bars: share of each of {number_of} checkpoints in the variance of the score.",
        bars, lambda: Canvas(480, extra, margin, 14, 8, 46), lambda: Canvas(340, extra, margin, 14, 8, 46),
    )  # fmt: skip
    return first, second


@dataclass(frozen=True)
class Interval:
    """A row of an interval plot: a value with the ends of its interval, and what stands beside and behind it."""

    name: str
    value: float
    low: float
    high: float
    note: str
    css: str = "kept"


def interval_figure(
    title: str, see: str, label: str, rows: Sequence[Interval], mark: float | None = None, factor: float = 1.0
) -> Figure:
    """Dots with whiskers, one row each; `mark` draws a reference line and `factor` multiplies all values (100: %)."""
    values = [end * factor for row in rows for end in (row.low, row.high, row.value) if math.isfinite(end)]
    low, high = min(values), max(values)
    if mark is not None:
        low, high = min(low, mark * factor), max(high, mark * factor)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    if factor == 100:
        low, high = max(0.0, low - margin), min(100.0, high + margin)
    else:
        low, high = low - margin, high + margin

    left = min(round(max(len(row.name) for row in rows) * WIDTH_WHEN_WIDE) + 16, 330)
    right = round(max(len(row.note) for row in rows) * WIDTH_WHEN_WIDE) + 16

    def drawing(canvas: Canvas) -> None:
        x = canvas.x_scale(low, high)
        canvas.x_axis(x, label, grid=True)
        height = (canvas.bottom - canvas.top) / len(rows)
        if mark is not None:
            canvas.line(x(mark * factor), canvas.top, x(mark * factor), canvas.bottom, "threshold")
        for position, row in enumerate(rows):
            middle = canvas.top + (position + 0.5) * height
            letter = WIDTH_OF_LETTER if canvas.narrow else WIDTH_WHEN_WIDE
            room = canvas.width - letter * len(row.note) - 24 if canvas.narrow else left - 12
            limit = max(8, int(room / letter))
            name = row.name if len(row.name) <= limit else row.name[: limit - 1] + "\u2026"
            if canvas.narrow:
                canvas.text(canvas.left, middle - 8, name, "strong")
                canvas.text(canvas.right, middle - 8, row.note, "soft", "end")
                middle += 8
            else:
                canvas.text(canvas.left - 12, middle + 4, name, "strong", "end")
                canvas.text(canvas.right + 12, middle + 4, row.note, "soft")
            description = f"{row.name}: {row.note}"
            if math.isfinite(row.low) and math.isfinite(row.high):
                canvas.line(x(row.low * factor), middle, x(row.high * factor), middle, f"whisker {row.css}-line")
            canvas.circle(x(row.value * factor), middle, 5, row.css, description)

    description = "; ".join(f"{row.name} {row.note}" for row in rows[:12])
    return draw(
        title, see, f"{title}: {description}.", drawing,
        lambda: Canvas(960, len(rows) * 28 + 62, left, right, 10, 46),
        lambda: Canvas(340, len(rows) * 46 + 62, 6, 6, 10, 46),
    )  # fmt: skip
