"""From the raw numbers of several runs to the table: how well each estimator agrees with what retraining shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline.arrays import Bool, Float64, Int64
from pipeline.evaluation.correlation import Interval, difference_of_spearman, mean_spearman, spearman
from pipeline.evaluation.lds import predicted_outcomes


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

    utilities: dict[str, Float64]
    costs: dict[str, tuple[float, float]]
    rows: Int64
    changes: Float64
    halves: Bool
    outcomes: Float64
    partial: Float64 | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Whether something carries over to another model (`loo_other`, `lds_other`): the utilities averaged over all runs but
    one against what that one's seed shows, mean over the seeds; None where there is one seed only.

    Attributes:
        estimator: its name.
        directions: cost of the directions of one run, in forward passes over the pairs.
        scoring: cost of scoring with one run, in the same unit.
        loo: rank correlation with leave-one-out in the same run, mean over runs.
        loo_partial: as `loo` with a share of each pair taken away; None where that was not measured.
        loo_other: rank correlation with leave-one-out of another seed.
        lds: LDS of a run's utilities with the outcomes of the same seed, mean over runs.
        lds_other: LDS with the outcomes of another seed.
        behind: by how much `lds` of `unrolled (checkpoints)` is above this one's; None without it.
        behind_other: the same of `lds_other`.
    """

    estimator: str
    directions: float
    scoring: float
    loo: Interval
    loo_partial: Interval | None
    loo_other: Interval | None
    lds: Interval
    lds_other: Interval | None
    behind: Interval | None
    behind_other: Interval | None


#: The estimator that the others are compared with.
LEADER = "unrolled (checkpoints)"


def table(measured: Measured) -> list[Line]:
    """One line per estimator, in the order given."""
    outcomes = measured.outcomes
    several = len(outcomes) > 1
    leader = measured.utilities.get(LEADER)
    lines: list[Line] = []
    for name, utilities in measured.utilities.items():
        left_out = utilities[:, measured.rows]
        by_run = predicted_outcomes(utilities, measured.halves)
        behind = behind_other = None
        if leader is not None and name != LEADER:
            best = predicted_outcomes(leader, measured.halves)
            behind = difference_of_spearman(best, by_run, outcomes)
            behind_other = difference_of_spearman(_of_others(best), _of_others(by_run), outcomes) if several else None
        lines.append(
            Line(
                estimator=name,
                directions=measured.costs[name][0],
                scoring=measured.costs[name][1],
                loo=mean_spearman(left_out, measured.changes),
                loo_partial=None if measured.partial is None else mean_spearman(left_out, measured.partial),
                loo_other=mean_spearman(_of_others(left_out), measured.changes) if several else None,
                lds=mean_spearman(by_run, outcomes),
                lds_other=mean_spearman(_of_others(by_run), outcomes) if several else None,
                behind=behind,
                behind_other=behind_other,
            )
        )
    return lines


def _of_others(values: Float64) -> Float64:
    """For each run the mean over the other ones: `[s, k]` gives `[s, k]`."""
    others: Float64 = (values.sum(0) - values) / (len(values) - 1)
    return others


def between_seeds(outcomes: Float64) -> float:
    """Mean rank correlation of two seeds' outcomes `[s, h]`; NaN for one seed. If low, nothing carries over."""
    found = [spearman(one, other) for one, other in combinations(outcomes, 2)]
    return float(np.mean(found)) if found else float("nan")


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
