"""How an estimate gets better with the number of runs that it is averaged over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline.evaluation.agreement import Measured
from pipeline.evaluation.correlation import Floats, spearman
from pipeline.evaluation.lds import Bools, predicted_outcomes
from pipeline.evaluation.quality import auroc

#: Sets of runs looked at per number of runs; more are drawn from at random.
MOST_SETS = 32


@dataclass(frozen=True)
class RunsLine:
    """One estimator averaged over some of the runs: mean and standard deviation over sets of that many runs.

    Attributes:
        estimator: its name.
        runs: how many runs are averaged.
        lds: rank correlation of the halves' summed utilities with their outcomes averaged over all seeds.
        lds_std: its standard deviation over the sets.
        auroc: how well low utility finds the wrong pairs; None where they are not known.
        auroc_std: its standard deviation over the sets.
    """

    estimator: str
    runs: int
    lds: float
    lds_std: float
    auroc: float | None
    auroc_std: float | None


def by_runs(measured: Measured, wrong: Bools | None) -> Iterable[RunsLine]:
    """A line per estimator and number of runs, from one to all; each run's utilities are standardised first."""
    count = len(measured.outcomes)
    outcome = measured.outcomes.mean(0)
    for name, utilities in measured.utilities.items():
        standard = _standardised(utilities)
        for runs in range(1, count + 1):
            means = np.stack([standard[list(chosen)].mean(0) for chosen in _sets(count, runs)])
            found = [spearman(predicted_outcomes(mean, measured.halves), outcome) for mean in means]
            known = wrong is not None and wrong.any()
            rates = [auroc(mean, wrong) for mean in means] if known and wrong is not None else None
            yield RunsLine(
                estimator=name,
                runs=runs,
                lds=float(np.mean(found)),
                lds_std=float(np.std(found)),
                auroc=None if rates is None else float(np.mean(rates)),
                auroc_std=None if rates is None else float(np.std(rates)),
            )


def _standardised(utilities: Floats) -> Floats:
    """Each run's utilities `[s, n]` with mean 0 and spread 1, so that no run outweighs the others."""
    spread = utilities.std(1, keepdims=True)
    standard: Floats = (utilities - utilities.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return standard


def _sets(count: int, size: int) -> list[tuple[int, ...]]:
    every = list(combinations(range(count), size)) if count <= 12 else []
    if every and len(every) <= MOST_SETS:
        return every
    generator = np.random.default_rng(size)
    return [tuple(generator.choice(count, size, replace=False).tolist()) for _ in range(MOST_SETS)]
