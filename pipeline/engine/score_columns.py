"""The numeric columns of a score file: score, utility and its spread from the terms of every checkpoint."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from pipeline.influence import ScoreBatch, utility_of
from pipeline.literals import EstimatorName


class ScoreColumns:
    """The numeric columns of a shard, from the scores of its readable pairs.

    Args:
        total: rows of the shard.
        runs: int64 `[m]`, the proxy run of each checkpoint.
        estimator: decides how a score becomes a utility.

    Attributes:
        not_finite: for rows whose score is not a finite number: which checkpoint's term is to blame.
        terms: float32 `[total, m]`, NaN where a term does not count and in rows without any.
        values: the other columns, float32 `[total]` each, NaN where there is no value.
    """

    def __init__(self, total: int, runs: NDArray[np.int64], estimator: EstimatorName) -> None:
        self.not_finite: dict[int, str] = {}
        self._runs = runs
        self._estimator = estimator
        self.terms = np.full((total, len(runs)), np.nan, np.float32)
        self.values = {
            name: np.full(total, np.nan, np.float32)
            for name in ("utility", "utility_std", "score", "loss", "similarity")
        }

    def fill(self, places: NDArray[np.int64], scores: ScoreBatch) -> None:
        """Take in the scores of the pairs in rows `places`."""
        self.fill_terms(places, scores.terms, scores.counts)
        self.fill_seen(places, scores.loss, scores.similarity)

    def fill_seen(self, places: NDArray[np.int64], loss: Tensor, similarity: Tensor) -> None:
        """Take in what a forward pass shows of the pairs in rows `places`."""
        self.values["loss"][places] = loss.float().numpy()
        self.values["similarity"][places] = similarity.float().numpy()

    def fill_open(self, places: NDArray[np.int64], counts: Tensor) -> None:
        """Note for the pairs in rows `places`, which are to be predicted, which terms count: bool `[b, m]`."""
        counted = counts.numpy()
        self.terms[places] = np.where(counted, np.float32(0), np.float32(np.nan))
        for place in places[~counted.any(1)].tolist():
            self.not_finite[place] = _NOT_HELD_OUT

    def fill_terms(self, places: NDArray[np.int64], computed: Tensor, counts: Tensor, error: float = 0.0) -> None:
        """Take in terms `[b, m]` of the pairs in rows `places`: those that count (bool `[b, m]`) add up to score.

        `error` is the standard error of scores that were predicted; that over proxy runs comes on top of it.
        """
        counted = counts.numpy()
        terms = np.where(counted, computed.double().numpy(), 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            # What counts is what the file can hold: a value beyond float32 is not finite there.
            stored = terms.astype(np.float32)
            score = terms.sum(1).astype(np.float32)
            spread = np.hypot(self._standard_error(terms, counted), error).astype(np.float32)
        finite = np.isfinite(stored).all(1) & np.isfinite(score) & counted.any(1)
        good = places[finite]
        self.values["score"][good] = score[finite]
        self.values["utility"][good] = utility_of(self._estimator, score[finite])
        self.values["utility_std"][good] = spread[finite]
        self.terms[good] = np.where(counted, stored, np.nan)[finite]
        self.terms[places[~finite]] = np.nan
        for place, row, counting in zip(places[~finite].tolist(), stored[~finite], counted[~finite], strict=True):
            self.not_finite[place] = _blame(row, counting)

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

    def columns(self) -> dict[str, pa.Array]:
        """The columns by name; what is not finite is null."""
        arrays = {name: pa.array(values, mask=~np.isfinite(values)) for name, values in self.values.items()}
        return {**arrays, "terms": terms_column(self.terms)}


def terms_column(terms: NDArray[np.float32]) -> pa.ListArray:
    """Terms `[n, m]` as a list column: what is not finite is null, and so are rows without any finite one."""
    known = np.isfinite(terms).any(1)
    ends = np.concatenate([[0], np.cumsum(known * terms.shape[1])]).astype(np.int32)
    values = terms[known].reshape(-1)
    # A null offset makes its row null.
    offsets = pa.array(ends, mask=np.append(~known, False))
    return pa.ListArray.from_arrays(offsets, pa.array(values, mask=~np.isfinite(values)))


_NOT_HELD_OUT = "every proxy run was trained on the pair, none is held out"


def _blame(row: NDArray[np.float32], counted: NDArray[np.bool_]) -> str:
    """Why the score that these terms `[m]` add up to is not a finite number."""
    if not counted.any():
        return _NOT_HELD_OUT
    bad = np.flatnonzero(~np.isfinite(row))
    return f"term of checkpoint {bad[0]} is {row[bad[0]]}" if len(bad) else "the sum of the terms overflows"
