"""Standardised terms: every checkpoint's term as a z-score over all pairs, summed per proxy run, averaged over runs.

One run's influence is mostly noise, and checkpoints differ in scale by orders of magnitude; standardised first, each
checkpoint has an equal say (influence.md, "From influence to a choice"). Zero is then the mean pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.arrays import Float64, Int64


@dataclass(frozen=True)
class Moments:
    """Count [m], mean [m] and summed squared deviation [m] of the terms of some pairs; `agreement` sums the sign of
    utility times score over them, which tells the estimator's sign."""

    count: Int64
    mean: Float64
    squares: Float64
    agreement: int

    @staticmethod
    def none(width: int) -> Moments:
        """Moments of no pairs."""
        return Moments(np.zeros(width, np.int64), np.zeros(width), np.zeros(width), 0)

    @staticmethod
    def of(terms: Float64, agreement: int) -> Moments:
        """Moments of `terms` [n, m]; NaN where a term does not count."""
        known = np.isfinite(terms)
        count = known.sum(axis=0)
        mean = np.where(known, terms, 0.0).sum(axis=0) / np.maximum(count, 1)
        return Moments(count, mean, np.where(known, (terms - mean) ** 2, 0.0).sum(axis=0), agreement)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub and LeVeque's update)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.count * share
        return Moments(count, self.mean + apart * share, squares, self.agreement + other.agreement)


@dataclass(frozen=True)
class Standardisation:
    """How terms become `zterms`: mean and standard deviation [m], the run of each term [m], the sign that makes a
    high value one to keep."""

    mean: Float64
    std: Float64
    runs: Int64
    sign: int

    @staticmethod
    def of(parts: Iterable[Moments], runs: Int64) -> Standardisation:
        """From the moments of the shards, in their order."""
        total = Moments.none(len(runs))
        for part in parts:
            total = total + part
        std = np.sqrt(total.squares / np.maximum(total.count, 1))
        return Standardisation(total.mean, std, runs, -1 if total.agreement < 0 else 1)

    def combine(self, column: pa.Array) -> tuple[Float64, Float64]:
        """`zterms` [n], the mean over runs of the summed z-scores, and `zterms_std` [n], its standard error.

        A term that is the same for all pairs adds nothing. Only runs that count for a pair are averaged; with fewer
        than two the standard error is NaN.
        """
        scale = np.divide(self.sign, self.std, out=np.zeros_like(self.std), where=self.std > 0)
        z = (terms_matrix(column, self.runs) - self.mean) * scale
        per_run = np.stack([z[:, self.runs == run].sum(axis=1) for run in np.unique(self.runs)], axis=1)
        counted = np.isfinite(per_run)
        number = counted.sum(axis=1)
        mean = np.divide(np.where(counted, per_run, 0.0).sum(axis=1), number, where=number > 0,
                         out=np.full(len(z), np.nan))  # fmt: skip
        squares = np.where(counted, (per_run - mean[:, None]) ** 2, 0.0).sum(axis=1)
        variance = np.divide(squares, number * (number - 1), where=number > 1, out=np.full(len(z), np.nan))
        return mean, np.sqrt(variance)


def terms_matrix(column: Any, runs: Int64) -> Float64:
    """A list column as float64 [n, m], each run's terms as large as if all `runs` [m] counted.

    Terms that do not count (null) are NaN, and so are rows of another length (those without a score). In the file
    the terms of a pair that few runs count for are larger, since they add up to the score.
    """
    width = len(runs)
    lengths = np.asarray(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    result = np.full((len(column), width), np.nan)
    whole = lengths == width
    flat = np.asarray(column.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
    result[whole] = flat.reshape(-1, width)
    counted = np.isfinite(result)
    if counted.all():
        return result
    names = np.unique(runs)
    share = np.stack([counted[:, runs == run].any(axis=1) for run in names], axis=1).mean(axis=1)
    return np.asarray(result * share[:, None], np.float64)
