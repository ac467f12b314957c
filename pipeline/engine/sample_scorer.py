"""The first pass of amortised scoring: the sampled pairs of a shard are scored, and all are embedded."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.decode import DecodedShard
from pipeline.data.inventory import ShardInfo
from pipeline.engine.sample import in_sample
from pipeline.engine.score_columns import ScoreColumns
from pipeline.engine.shard_scorer import ShardScorer, decoded_table
from pipeline.run import RunFolder
from pipeline.store.scores import embedding_column


class SampleScorer(ShardScorer):
    """Scores the sampled pairs of a shard and embeds all.

    A pair with status `ok` and no score is to be predicted; of its terms those that count are zero, the others null.
    """

    @property
    def folder(self) -> RunFolder:
        """Where the score files go."""
        return RunFolder(RunFolder(self.config.out).sample)

    def table(self, shard: ShardInfo, decoded: DecodedShard) -> pa.Table:
        """A row for every sample; `embedding` holds those of all proxy runs, run by run."""
        config, batch = self.config, decoded.batch
        numbers = ScoreColumns(len(decoded.rows), self.runs, config.score.estimator)
        seen = self.scorer.observe(batch if len(batch) else self.scorer.reference[:1].to("cpu"))
        embedding = seen.embedding.flatten(1).numpy()[: len(batch)]
        if len(batch):
            numbers.fill_seen(decoded.ok, seen.loss, seen.similarity)
            numbers.fill_open(decoded.ok, seen.counts[:, self._run_of_term])
            chosen = in_sample(batch.ids, config)
            if chosen.any():
                numbers.fill(decoded.ok[chosen.numpy()], self.scorer.score(batch[chosen]))
        return decoded_table(shard, decoded, numbers, embedding_column(embedding, decoded.ok, len(decoded.rows)))

    @property
    def _run_of_term(self) -> NDArray[np.int64]:
        """Int64 `[m]`, for each checkpoint the place of its run among the runs."""
        return np.unique(self.runs, return_inverse=True)[1].astype(np.int64)
