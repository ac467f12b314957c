"""What comes of training on a set of pairs: a row of `evaluation/results.json`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Result:
    """One row of `evaluation/results.json`: a set, what chose it, its size, and the metric over the seeds.

    `share` is what a choice keeps of the scored pairs (those held out as the target aside), None for sets of their own
    size; `std` the standard deviation over seeds (n - 1); NaN with one seed.
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
