"""From the raw numbers of several runs to the table: how well each estimator agrees with what retraining shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.correlation import Floats, Interval, difference_of_spearman, mean_spearman
from pipeline.evaluation.lds import predicted_outcomes

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """What was measured over `s` runs of `n` pairs.

    Attributes:
        utilities: of each estimator, `[s, n]`.
        costs: of each estimator: forward passes over the pairs for its directions, and for scoring.
        rows: the pairs that were left out one at a time, `[k]`.
        changes: of the target loss without them, `[s, k]`.
        partial: the same without a share of each only, or None.
        halves: bool `[h, n]`.
        outcomes: of training on each half, `[s, h]`.
    """

    utilities: dict[str, Floats]
    costs: dict[str, tuple[float, float]]
    rows: NDArray[np.int64]
    changes: Floats
    halves: Bools
    outcomes: Floats
    partial: Floats | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        estimator: its name.
        directions: cost of the directions of one run, in forward passes over the pairs.
        scoring: cost of scoring with one run, likewise.
        loo: rank correlation with leave-one-out in the same run, mean over runs.
        loo_mean: the same with utilities and changes averaged over the runs first.
        loo_partial: as `loo` with a share of each pair taken away; None where that was not measured.
        lds_same: LDS of a run's utilities with the outcomes of the same seed, mean over runs.
        lds_one: LDS of one run's utilities, mean over runs (outcomes averaged over seeds).
        lds: LDS of the utilities averaged over all runs.
        ahead_same: by how much `lds_same` of `unrolled (checkpoints)` is above this one's; None without it.
        ahead: the same of `lds`.
    """

    estimator: str
    directions: float
    scoring: float
    loo: Interval
    loo_mean: Interval
    loo_partial: Interval | None
    lds_same: Interval
    lds_one: Interval
    lds: Interval
    ahead_same: Interval | None
    ahead: Interval | None


#: The estimator that the others are compared with.
LEADER = "unrolled (checkpoints)"


def table(measured: Measured) -> list[Line]:
    """One line per estimator, in the order given."""
    outcome = measured.outcomes.mean(0, keepdims=True)
    each = np.repeat(outcome, len(measured.outcomes), 0)
    lines: list[Line] = []
    leader = measured.utilities.get(LEADER)
    for name, utilities in measured.utilities.items():
        mean = utilities.mean(0, keepdims=True)
        left_out = utilities[:, measured.rows]
        predicted = predicted_outcomes(mean, measured.halves)
        by_run = predicted_outcomes(utilities, measured.halves)
        ahead_same = ahead = None
        if leader is not None and name != LEADER:
            best = predicted_outcomes(leader.mean(0, keepdims=True), measured.halves)
            best_by_run = predicted_outcomes(leader, measured.halves)
            ahead_same = difference_of_spearman(best_by_run, by_run, measured.outcomes)
            ahead = difference_of_spearman(best, predicted, outcome)
        lines.append(
            Line(
                estimator=name,
                directions=measured.costs[name][0],
                scoring=measured.costs[name][1],
                loo=mean_spearman(left_out, measured.changes),
                loo_mean=mean_spearman(mean[:, measured.rows], measured.changes.mean(0, keepdims=True)),
                loo_partial=None if measured.partial is None else mean_spearman(left_out, measured.partial),
                lds_same=mean_spearman(by_run, measured.outcomes),
                lds_one=mean_spearman(by_run, each),
                lds=mean_spearman(predicted, outcome),
                ahead_same=ahead_same,
                ahead=ahead,
            )
        )
    return lines


def raw_rows(measured: Measured) -> Iterable[dict[str, object]]:
    """Every predicted and true effect: measure, estimator, seed, item, predicted, true."""
    for name, utilities in measured.utilities.items():
        halves = predicted_outcomes(utilities, measured.halves)
        for seed in range(len(utilities)):
            for item, row in enumerate(measured.rows.tolist()):
                yield _row("leave-one-out", name, seed, row, utilities[seed, row], measured.changes[seed, item])
                if measured.partial is not None:
                    yield _row("partial", name, seed, row, utilities[seed, row], measured.partial[seed, item])
            for item in range(len(measured.halves)):
                yield _row("lds", name, seed, item, halves[seed, item], measured.outcomes[seed, item])


def _row(measure: str, estimator: str, seed: int, item: int, predicted: float, true: float) -> dict[str, object]:
    return {
        "measure": measure,
        "estimator": estimator,
        "seed": seed,
        "item": item,
        "predicted": float(predicted),
        "true": float(true),
    }
