"""The second pass of amortised scoring: what was not computed is predicted, from what the first pass has left."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo
from pipeline.data.reasons import Reason
from pipeline.engine.sample import observed, read_sampled
from pipeline.engine.score_columns import ScoreColumns, terms_column
from pipeline.influence import Regressor, scaled_up
from pipeline.prepared import load_regressor
from pipeline.run import RunFolder
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import embedding_column, score_table


def build_predictor(
    config: Config,
    fingerprint: Fingerprint,
    sampled: Fingerprint,
    runs: Sequence[int],
    error: float,
    worker: str,
) -> ShardPredictor:
    """Load the regressor; the arguments are those of `pipeline.engine.scorer_spec.PredictorSpec`."""
    torch.set_num_threads(1)
    regressor = load_regressor(config.out, fingerprint.parts["regressor"])
    return ShardPredictor(config, fingerprint, sampled, np.array(runs), error, regressor, worker)


class ShardPredictor:
    """Completes a shard's scores (`pipeline.engine.worker.ShardWork`): no image is read, no model is run."""

    def __init__(
        self,
        config: Config,
        fingerprint: Fingerprint,
        sampled: Fingerprint,
        runs: NDArray[np.int64],
        error: float,
        regressor: Regressor,
        worker: str,
    ) -> None:
        self._config = config
        self._run = RunFolder(config.out)
        self._fingerprint = fingerprint
        self._sampled = sampled
        self._runs = runs
        self._error = error
        self._regressor = regressor
        self._worker = worker

    def load(self, shard: ShardInfo) -> tuple[pa.Table, str]:
        """What the first pass left of the shard, and how its tar ended.

        Raises as `read_sampled`.
        """
        return read_sampled(self._run, shard, self._sampled)

    def score(self, shard: ShardInfo, loaded: tuple[pa.Table, str]) -> tuple[pa.Table, str]:
        """Predict what was not computed; what was computed stays as it is."""
        return self._completed(loaded[0]), loaded[1]

    def commit(self, shard: ShardInfo, scored: tuple[pa.Table, str], seconds: dict[str, float]) -> dict[str, int]:
        """Write score file and mark; returns rows by status."""
        return commit_scores(
            self._run,
            shard,
            scored[0],
            self._fingerprint,
            estimator=self._config.score.estimator,
            seconds=seconds,
            finished=time.time(),
            worker=self._worker,
            end_error=scored[1],
        ).statuses

    def _completed(self, table: pa.Table) -> pa.Table:
        config = self._config
        open_rows = pc.and_(pc.equal(table["status"], "ok"), pc.is_null(table["score"])).to_numpy()
        places = np.flatnonzero(open_rows)
        seen = observed(table, places, self._runs)
        numbers = ScoreColumns(len(places), self._runs, config.score.estimator)
        if len(places):
            predicted = scaled_up(self._regressor.predict(seen), self._regressor.runs.tolist())
            counts = seen.counts[:, self._regressor.runs]
            numbers.fill_terms(np.arange(len(places)), predicted, counts, error=self._error)
        columns = {name: table[name].combine_chunks() for name in table.schema.names}
        embedding = columns.pop("embedding")
        status, errors = columns["status"].to_pylist(), columns["error"].to_pylist()
        for place, error in numbers.not_finite.items():
            status[places[place]], errors[places[place]] = str(Reason.NOT_FINITE), error
        for name in ("utility", "utility_std", "score"):
            values = columns[name].to_numpy(zero_copy_only=False).copy()
            values[places] = numbers.values[name]
            columns[name] = pa.array(values, mask=~np.isfinite(values))
        terms = _stored_terms(columns["terms"], len(self._runs))
        terms[places] = numbers.terms
        columns |= {
            "status": pa.array(status),
            "error": pa.array(errors),
            "terms": terms_column(terms),
            "predicted": pa.array(open_rows & np.array([value == "ok" for value in status], dtype=bool)),
        }
        last = _last_embedding(embedding, len(np.unique(self._runs))) if config.score.embeddings else None
        return score_table(columns, last)


def _stored_terms(column: pa.ListArray, width: int) -> NDArray[np.float32]:
    """A list column as it is stored, float32 `[n, m]`; NaN where it is null."""
    known = column.is_valid().to_numpy(zero_copy_only=False)
    terms = np.full((len(column), width), np.nan, np.float32)
    terms[known] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return terms


def _last_embedding(column: pa.FixedSizeListArray, runs: int) -> pa.FixedSizeListArray:
    """Of the embeddings of all runs the last one's, which is what score files hold."""
    size = column.type.list_size // runs
    places = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(places), -1)[:, -size:]
    return embedding_column(values.astype(np.float16), places, len(column))
