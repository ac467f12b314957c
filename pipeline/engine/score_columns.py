"""The numeric columns of a score file: score, utility and its spread from the terms of every checkpoint."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import EstimatorName
from pipeline.influence import ScoreBatch, utility_of


class ScoreColumns:
    """The numeric columns of a shard, from the scores of its readable pairs.

    Args:
        total: rows of the shard.
        runs: int64 `[m]`, the proxy run of each checkpoint.
        estimator: decides how a score becomes a utility.

    Attributes:
        not_finite: for rows whose score is not a finite number: which checkpoint's term is to blame.
    """

    def __init__(self, total: int, runs: NDArray[np.int64], estimator: EstimatorName) -> None:
        self.not_finite: dict[int, str] = {}
        self._runs = runs
        self._estimator = estimator
        self._total = total
        self._terms: list[list[float | None] | None] = [None] * total
        self._values = {
            name: np.full(total, np.nan, np.float32)
            for name in ("utility", "utility_std", "score", "loss", "similarity")
        }

    def fill(self, places: NDArray[np.int64], scores: ScoreBatch) -> None:
        """Take in the scores of the pairs in rows `places`: the terms that count add up to score.

        Terms that do not count are null.
        """
        counts = scores.counts.numpy()
        terms = np.where(counts, scores.terms.double().numpy(), 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            # What counts is what the file can hold: a value beyond float32 is not finite there.
            stored = terms.astype(np.float32)
            score = terms.sum(1).astype(np.float32)
            spread = self._standard_error(terms, counts).astype(np.float32)
        finite = np.isfinite(stored).all(1) & np.isfinite(score) & counts.any(1)
        good = places[finite]
        self._values["score"][good] = score[finite]
        self._values["utility"][good] = utility_of(self._estimator, score[finite])
        self._values["utility_std"][good] = spread[finite]
        self._values["loss"][places] = scores.loss.float().numpy()
        self._values["similarity"][places] = scores.similarity.float().numpy()
        for place, row, counted, fine in zip(places.tolist(), stored, counts, finite, strict=True):
            if fine:
                self._terms[place] = [term if one else None for term, one in zip(row.tolist(), counted, strict=True)]
            else:
                self.not_finite[place] = _blame(row, counted)

    def _standard_error(self, terms: NDArray[np.float64], counts: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Standard error of the score over the runs that count `[b]`; NaN where fewer than two do.

        Terms carry the factor 1 / number of those runs, so a run's own score is that many times the sum of its terms.
        """
        runs = np.unique(self._runs)
        counted = np.stack([counts[:, self._runs == run].all(1) for run in runs], axis=1)
        number = counted.sum(1)
        own = np.stack([number * terms[:, self._runs == run].sum(1) for run in runs], axis=1)
        mean = own.sum(1) / np.maximum(number, 1)
        squares = np.where(counted, (own - mean[:, None]) ** 2, 0.0).sum(1)
        variance = np.divide(squares, number * (number - 1), out=np.full(len(terms), np.nan), where=number > 1)
        return np.asarray(np.sqrt(variance), np.float64)

    def columns(self) -> dict[str, pa.Array | list[list[float | None] | None]]:
        """The columns by name; what is not finite is null."""
        arrays = {name: pa.array(values, mask=~np.isfinite(values)) for name, values in self._values.items()}
        return {**arrays, "terms": self._terms}


def _blame(row: NDArray[np.float32], counted: NDArray[np.bool_]) -> str:
    """Why the score that these terms `[m]` add up to is not a finite number."""
    if not counted.any():
        return "every proxy run was trained on the pair, none is held out"
    bad = np.flatnonzero(~np.isfinite(row))
    return f"term of checkpoint {bad[0]} is {row[bad[0]]}" if len(bad) else "the sum of the terms overflows"
