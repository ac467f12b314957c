"""Standardised terms: every checkpoint's term as a z-score over all pairs, summed per proxy run, averaged over runs.

One run's influence is mostly noise, and checkpoints differ in scale by orders of magnitude; standardised first, each
checkpoint has an equal say (influence.md, "From influence to a choice"). Zero is then the mean pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean [m] and summed squared deviation [m] of the terms of some pairs; `agreement` sums the sign of
    utility times score over them, which tells the estimator's sign."""

    count: int
    mean: Float64
    squares: Float64
    agreement: int

    @staticmethod
    def of(terms: Float64, agreement: int) -> Moments:
        """Moments of `terms` [n, m]."""
        if len(terms) == 0:
            zeros = np.zeros(terms.shape[1])
            return Moments(0, zeros, zeros, 0)
        mean = terms.mean(axis=0)
        return Moments(len(terms), mean, ((terms - mean) ** 2).sum(axis=0), agreement)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub and LeVeque's update)."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart**2 * (self.count * other.count / count)
        return Moments(count, mean, squares, self.agreement + other.agreement)


@dataclass(frozen=True)
class Standardisation:
    """How terms become `zterms`: mean and standard deviation [m], the run of each term [m], the sign that makes a
    high value one to keep."""

    mean: Float64
    std: Float64
    runs: npt.NDArray[np.int64]
    sign: int

    @staticmethod
    def of(parts: Iterable[Moments], runs: npt.NDArray[np.int64]) -> Standardisation:
        """From the moments of the shards, in their order."""
        total = Moments(0, np.zeros(len(runs)), np.zeros(len(runs)), 0)
        for part in parts:
            total = total + part
        std = np.sqrt(total.squares / max(total.count, 1))
        return Standardisation(total.mean, std, runs, -1 if total.agreement < 0 else 1)

    def combine(self, column: pa.Array) -> tuple[Float64, Float64]:
        """`zterms` [n], the mean over runs of the summed z-scores, and `zterms_std` [n], its standard error.

        A term that is the same for all pairs adds nothing. With one run the standard error is NaN.
        """
        scale = np.divide(self.sign, self.std, out=np.zeros_like(self.std), where=self.std > 0)
        z = (terms_matrix(column, len(self.mean)) - self.mean) * scale
        names = np.unique(self.runs)
        per_run = np.stack([z[:, self.runs == run].sum(axis=1) for run in names], axis=1)
        mean = per_run.mean(axis=1)
        if len(names) == 1:
            return mean, np.full(len(mean), np.nan)
        return mean, per_run.std(axis=1, ddof=1) / np.sqrt(len(names))


def terms_matrix(column: Any, width: int) -> Float64:
    """A list column as float64 [n, width]; rows of another length (those without a score) are NaN."""
    lengths = np.asarray(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    result = np.full((len(column), width), np.nan)
    whole = lengths == width
    flat = np.asarray(column.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
    result[whole] = flat.reshape(-1, width)
    return result
