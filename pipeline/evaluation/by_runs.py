"""How an estimate gets better with the number of runs that it is averaged over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline.arrays import Bool, Float64
from pipeline.evaluation.agreement import Measured
from pipeline.evaluation.correlation import spearman
from pipeline.evaluation.lds import predicted_outcomes
from pipeline.evaluation.quality import auroc

#: Sets of runs looked at per number of runs; where there are more, that many are drawn at random.
MOST_SETS = 32


@dataclass(frozen=True)
class RunsLine:
    """One estimator averaged over some of the runs: mean and standard deviation over sets of that many runs.

    The sets overlap, so the deviation falls with their size whatever is measured. It is None where there is one set.

    Attributes:
        estimator: its name.
        runs: how many runs are averaged.
        lds: rank correlation of the halves' summed utilities with their outcomes in a seed that is not among the
            runs, mean over those; None for all runs.
        lds_std: its standard deviation over the sets.
        auroc: how well low utility finds the wrong pairs; None where they are not known.
        auroc_std: its standard deviation over the sets.
    """

    estimator: str
    runs: int
    lds: float | None
    lds_std: float | None
    auroc: float | None
    auroc_std: float | None


def by_runs(measured: Measured, wrong: Bool | None) -> Iterable[RunsLine]:
    """A line per estimator and number of runs, from one to all; each run's utilities are standardised first."""
    count = len(measured.outcomes)
    known = wrong if wrong is not None and wrong.any() else None
    for name, utilities in measured.utilities.items():
        standard = _standardised(utilities)
        for runs in range(1, count + 1):
            found, rates = [], []
            for chosen in _sets(count, runs):
                mean = standard[list(chosen)].mean(0)
                predicted = predicted_outcomes(mean, measured.halves)
                unseen = np.delete(measured.outcomes, chosen, axis=0)
                if len(unseen):
                    found.append(float(np.mean([spearman(predicted, outcome) for outcome in unseen])))
                if known is not None:
                    rates.append(auroc(mean, known))
            yield RunsLine(name, runs, *_over_sets(found), *_over_sets(rates))


def _over_sets(found: list[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation."""
    if not found:
        return None, None
    return float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None


def _standardised(utilities: Float64) -> Float64:
    """Each run's utilities `[s, n]` with mean 0 and spread 1, so that no run outweighs the others."""
    spread = utilities.std(1, keepdims=True)
    standard: Float64 = (utilities - utilities.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return standard


def _sets(count: int, size: int) -> list[tuple[int, ...]]:
    every = list(combinations(range(count), size)) if count <= 12 else []
    if every and len(every) <= MOST_SETS:
        return every
    generator = np.random.default_rng(size)
    return [tuple(generator.choice(count, size, replace=False).tolist()) for _ in range(MOST_SETS)]
