"""What comes of training on a set of pairs: a row of `evaluation/results.json`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: A difference that the seeds alone would give in less than this share of cases counts as one between the sets.
LEVEL = 0.05


@dataclass(frozen=True)
class Result:
    """One row of `evaluation/results.json`: a set, what chose it, its size, and the metric over the seeds.

    `share` is what a choice keeps of the scored pairs (without those held out as the target); None for sets of their
    own size. `std` is the standard deviation over the seeds (n - 1); NaN with one seed.
    """

    set: str
    series: str
    share: float | None
    size: int
    metric: str
    mean: float
    std: float
    seeds: int
    values: list[float]

    @staticmethod
    def of(name: str, series: str, share: float | None, size: int, metric: str, values: list[float]) -> Result:
        """Mean and spread of `values`."""
        std = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        return Result(name, series, share, size, metric, float(np.mean(values)), std, len(values), values)

    def differs_from(self, other: Result) -> bool:
        """Whether the means differ by more than the seeds explain: Welch's t test; False where a set has one seed."""
        if self.seeds < 2 or other.seeds < 2:
            return False
        from scipy.special import stdtr  # the driver needs it at its very end alone

        errors = np.array([self.std**2 / self.seeds, other.std**2 / other.seeds])
        if not errors.any():
            return self.mean != other.mean
        freedom = errors.sum() ** 2 / (errors**2 / [self.seeds - 1, other.seeds - 1]).sum()
        t = abs(self.mean - other.mean) / np.sqrt(errors.sum())
        return bool(2 * stdtr(freedom, -t) < LEVEL)
