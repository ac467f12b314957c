"""The numeric columns of a score file: score, utility and its spread from the terms of every checkpoint."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.influence import ScoreBatch


class ScoreColumns:
    """The numeric columns of a shard, from the scores of its readable pairs.

    Args:
        total: rows of the shard.
        runs: int64 `[m]`, the proxy run of each checkpoint.
        sign: factor from score to utility.

    Attributes:
        not_finite: for rows whose score is not a finite number: which checkpoint's term is to blame.
    """

    def __init__(self, total: int, runs: NDArray[np.int64], sign: int) -> None:
        self.not_finite: dict[int, str] = {}
        self._runs = runs
        self._sign = sign
        self._total = total
        self._terms: list[list[float] | None] = [None] * total
        self._values = {
            name: np.full(total, np.nan, np.float32)
            for name in ("utility", "utility_std", "score", "loss", "similarity")
        }

    def fill(self, places: NDArray[np.int64], scores: ScoreBatch) -> None:
        """Take in the scores of the pairs in rows `places`: score = sum of terms, utility = sign * score."""
        terms = scores.terms.double().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            # What counts is what the file can hold: a value beyond float32 is not finite there.
            stored = terms.astype(np.float32)
            score = terms.sum(1).astype(np.float32)
            spread = self._standard_error(terms).astype(np.float32)
        finite = np.isfinite(stored).all(1) & np.isfinite(score)
        good = places[finite]
        self._values["score"][good] = score[finite]
        self._values["utility"][good] = self._sign * score[finite]
        self._values["utility_std"][good] = spread[finite]
        self._values["loss"][places] = scores.loss.float().numpy()
        self._values["similarity"][places] = scores.similarity.float().numpy()
        for place, row, fine in zip(places.tolist(), stored, finite, strict=True):
            if fine:
                self._terms[place] = row.tolist()
            else:
                bad = np.flatnonzero(~np.isfinite(row))
                where = (
                    f"term of checkpoint {bad[0]} is {row[bad[0]]}" if len(bad) else "the sum of the terms overflows"
                )
                self.not_finite[place] = where

    def _standard_error(self, terms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Standard error of the score over proxy runs `[b]`; NaN with one run.

        Terms carry the factor 1 / number of runs, so a run's own score is that many times the sum of its terms.
        """
        runs = np.unique(self._runs)
        if len(runs) < 2:
            return np.full(len(terms), np.nan)
        own = np.stack([len(runs) * terms[:, self._runs == run].sum(1) for run in runs], axis=1)
        return np.asarray(own.std(axis=1, ddof=1) / np.sqrt(len(runs)), np.float64)

    def columns(self) -> dict[str, pa.Array | list[list[float] | None]]:
        """The columns by name; what is not finite is null."""
        arrays = {name: pa.array(values, mask=~np.isfinite(values)) for name, values in self._values.items()}
        return {**arrays, "terms": self._terms}
