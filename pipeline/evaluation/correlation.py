"""Rank correlations of predicted with true effects, and their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from pipeline.arrays import Float64, Int64

#: Resamples of a bootstrap interval, and its coverage.
RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap interval (NaN where there is none)."""

    value: float
    low: float
    high: float


def spearman(left: Float64, right: Float64) -> float:
    """Rank correlation of two vectors `[n]`; NaN where either is constant or not finite."""
    return float(spearman_rows(left[None], right[None])[0])


def spearman_rows(left: Float64, right: Float64) -> Float64:
    """Rank correlation of each row of `left [..., n]` with the same row of `right`, `[...]`."""
    finite = np.isfinite(left).all(-1) & np.isfinite(right).all(-1)
    a, b = rankdata(left, axis=-1), rankdata(right, axis=-1)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    usable = finite & (length > 0)
    return np.where(usable, (a * b).sum(-1) / np.where(usable, length, 1.0), np.nan)


def bootstrapped(statistic: Callable[[Int64], Float64], n: int, seed: int = 0) -> Interval:
    """A statistic of `n` items with its percentile bootstrap interval.

    Args:
        statistic: takes the numbers of the items of many resamples, `[..., n]` with repeats, and gives `[...]`.
        n: how many items there are.
        seed: decides the resamples.
    """
    value = float(statistic(np.arange(n)))
    if n < 3 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    found = statistic(drawn)
    # A resample in which all items tie has no rank correlation.
    low, high = np.nanquantile(found, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(value, float(low), float(high))


def mean_spearman(predicted: Float64, true: Float64, seed: int = 0) -> Interval:
    """Mean over runs of the rank correlation of `predicted [runs, n]` with `true [runs, n]`, items resampled."""

    def statistic(items: Int64) -> Float64:
        return _over_runs([spearman_rows(p[items], t[items]) for p, t in zip(predicted, true, strict=True)])

    return bootstrapped(statistic, predicted.shape[1], seed)


def difference_of_spearman(first: Float64, second: Float64, true: Float64, seed: int = 0) -> Interval:
    """By how much the first prediction correlates better than the second, each `[runs, n]`, on the same resamples."""

    def statistic(items: Int64) -> Float64:
        runs = zip(first, second, true, strict=True)
        return _over_runs([spearman_rows(a[items], t[items]) - spearman_rows(b[items], t[items]) for a, b, t in runs])

    return bootstrapped(statistic, true.shape[1], seed)


def _over_runs(found: list[Float64]) -> Float64:
    return np.asarray(np.mean(found, 0), np.float64)
