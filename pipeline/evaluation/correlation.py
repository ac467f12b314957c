"""Rank correlations of predicted with true effects, and how sure one can be of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata

Floats = NDArray[np.float64]

#: Resamples of a bootstrap interval, and its coverage.
RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap interval (NaN bounds where it cannot be had)."""

    value: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """Whether the two intervals lie apart, this one higher."""
        return self.low > other.high


def spearman(left: Floats, right: Floats) -> float:
    """Rank correlation; NaN where either is constant or not finite."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return float("nan")
    a, b = rankdata(left), rankdata(right)
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length else float("nan")


def bootstrapped(statistic: Callable[[NDArray[np.int64]], float], n: int, seed: int = 0) -> Interval:
    """A statistic of `n` items with its percentile bootstrap interval.

    Args:
        statistic: takes the numbers of the items, with repeats.
        n: how many items there are.
        seed: decides the resamples.
    """
    everyone = np.arange(n)
    value = statistic(everyone)
    if n < 3 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"))
    found = bootstrap(
        (everyone,),
        lambda items: statistic(np.asarray(items, np.int64)),
        n_resamples=RESAMPLES,
        confidence_level=COVERAGE,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def mean_spearman(predicted: Floats, true: Floats, seed: int = 0) -> Interval:
    """Mean over runs of the rank correlation of `predicted [runs, n]` with `true [runs, n]`, items resampled."""

    def statistic(items: NDArray[np.int64]) -> float:
        return float(np.mean([spearman(p[items], t[items]) for p, t in zip(predicted, true, strict=True)]))

    return bootstrapped(statistic, predicted.shape[1], seed)


def difference_of_spearman(first: Floats, second: Floats, true: Floats, seed: int = 0) -> Interval:
    """By how much the first prediction correlates better than the second, each `[runs, n]`, on the same resamples."""

    def statistic(items: NDArray[np.int64]) -> float:
        pairs = zip(first, second, true, strict=True)
        return float(np.mean([spearman(a[items], t[items]) - spearman(b[items], t[items]) for a, b, t in pairs]))

    return bootstrapped(statistic, true.shape[1], seed)
