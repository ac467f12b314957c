"""What an actor does with a shard: read and decode it, score its pairs at every checkpoint, write its score file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.decode import DecodedShard, Decoder
from pipeline.data.inventory import ShardInfo, check_unchanged
from pipeline.data.reader import Sample, read_shard
from pipeline.data.reasons import Reason
from pipeline.device import device_of_this_task
from pipeline.engine.connect import reserved_here
from pipeline.engine.failures import SampleError
from pipeline.engine.resources import decode_threads
from pipeline.engine.score_columns import ScoreColumns
from pipeline.errors import InputError
from pipeline.influence import Scorer
from pipeline.models.clip import build_model
from pipeline.models.manifest import Manifest
from pipeline.prepared import load_batches, load_plan, settings_of
from pipeline.replay.record import trained_ids
from pipeline.run import RunFolder
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import embedding_column, score_table

Work = TypeVar("Work", bound="ShardScorer")


def build_scorer(kind: type[Work], config: Config, fingerprint: Fingerprint, worker: str) -> Work:
    """Load model, checkpoints and plans once for this process; `fingerprint` is the run's, without a shard."""
    model = build_model(config.proxy.model, loss=config.proxy.loss)
    folder = RunFolder(config.out)
    manifest = Manifest.read(folder.checkpoint_manifest)
    checkpoints = []
    for entry in manifest.checkpoints:
        checkpoint = entry.load(model)
        checkpoint.adam = checkpoint.momentum = None  # the plans have what they need of it
        checkpoints.append(checkpoint)
    scorer = Scorer(
        model,
        [(checkpoint, load_plan(config.out, number)) for number, checkpoint in enumerate(checkpoints)],
        load_batches(config.out).reference,
        settings_of(config),
        device=device_of_this_task(config.score.precision),
        batch_size=config.score.batch_size,
        trained={run: torch.from_numpy(trained_ids(folder, run)) for run in manifest.runs}
        if config.score.held_out
        else None,
        compiled=config.score.compile,
    )
    decoder = Decoder.configured(model.image_spec, model.tokenize, config.data)
    runs = np.array([checkpoint.run for checkpoint in checkpoints])
    threads = decode_threads(config.engine, *reserved_here())
    return kind(config, fingerprint, scorer, decoder, runs, threads, worker)


@dataclass
class _Loaded:
    decoded: DecodedShard
    end_error: str


@dataclass
class _Scored:
    table: pa.Table
    end_error: str


class ShardScorer:
    """The work of an actor (`pipeline.engine.worker.ShardWork`).

    Args:
        config: the run's.
        fingerprint: of the run's scores, without a shard.
        scorer: scores batches of pairs.
        decoder: decodes samples.
        runs: int64 `[m]`, the proxy run of each checkpoint.
        threads: threads that decode one shard.
        worker: name of the actor, for marks.
    """

    def __init__(
        self,
        config: Config,
        fingerprint: Fingerprint,
        scorer: Scorer,
        decoder: Decoder,
        runs: NDArray[np.int64],
        threads: int,
        worker: str,
    ) -> None:
        self.config = config
        self.scorer = scorer
        self.runs = runs
        self._fingerprint = fingerprint
        self._decoder = decoder
        self._threads = threads
        self._worker = worker

    @property
    def folder(self) -> RunFolder:
        """Where the score files go."""
        return RunFolder(self.config.out)

    def load(self, shard: ShardInfo) -> _Loaded:
        """Read and decode every sample.

        Raises `InputError` when the shard is another one than that of the inventory, or has not as many samples as
        it had then: the connection broke in the middle; `SampleError` when one sample could not be dealt with at all.
        """
        check_unchanged(shard)
        with read_shard(shard.url, caption=self.config.data.caption) as reader:
            seen = _LastSample()
            try:
                decoded = self._decoder.decode_shard(seen.watch(iter(reader)), self._threads)
            except Exception as error:
                raise SampleError(seen.key) from error
        if len(decoded.rows) != shard.samples:
            ended = f" ({reader.end_error})" if reader.end_error else ""
            raise InputError(
                f"{shard.url}: expected the {shard.samples} samples of the inventory, found {len(decoded.rows)}{ended}"
            )
        return _Loaded(decoded, reader.end_error)

    def score(self, shard: ShardInfo, loaded: _Loaded) -> _Scored:
        """Score the readable pairs; a row for every sample."""
        return _Scored(self.table(shard, loaded.decoded), loaded.end_error)

    def commit(self, shard: ShardInfo, scored: _Scored, seconds: dict[str, float]) -> dict[str, int]:
        """Write score file and mark; returns rows by status."""
        return commit_scores(
            self.folder,
            shard,
            scored.table,
            self._fingerprint,
            estimator=self.config.score.estimator,
            seconds=seconds,
            finished=time.time(),
            worker=self._worker,
            end_error=scored.end_error,
        ).statuses

    def table(self, shard: ShardInfo, decoded: DecodedShard) -> pa.Table:
        """The score file's content: a row for every sample."""
        config, total = self.config, len(decoded.rows)
        numbers = ScoreColumns(total, self.runs, config.score.estimator)
        scores = self.scorer.score(decoded.batch) if len(decoded.batch) else None
        if scores is not None:
            numbers.fill(decoded.ok, scores)
        embedding = None
        if config.score.embeddings:
            values = scores.embedding.numpy() if scores is not None else self._no_embedding()
            embedding = embedding_column(values, decoded.ok, total)
        return decoded_table(shard, decoded, numbers, embedding)

    def _no_embedding(self) -> NDArray[np.float16]:
        """`[0, 2 d]`: the width must be right even in a file without a single scored pair."""
        one = self.scorer.score(self.scorer.reference[:1].to("cpu"))
        return np.empty((0, one.embedding.shape[1]), np.float16)


def decoded_table(
    shard: ShardInfo, decoded: DecodedShard, numbers: ScoreColumns, embedding: pa.Array | None
) -> pa.Table:
    """A score table from decoded samples and their numbers, all of them computed."""
    rows = decoded.rows
    status = [row.status for row in rows]
    errors = [row.error for row in rows]
    for place, error in numbers.not_finite.items():
        status[place], errors[place] = str(Reason.NOT_FINITE), error
    columns = {
        "uid": [row.uid for row in rows],
        "key": [row.key for row in rows],
        "shard": [shard.name] * len(rows),
        "index": [row.index for row in rows],
        "status": status,
        "error": errors,
        **numbers.columns(),
        "predicted": np.zeros(len(rows), dtype=bool),
        "width": [row.width or None for row in rows],
        "height": [row.height or None for row in rows],
        "caption_length": [row.caption_length for row in rows],
        "source": [row.source for row in rows],
        "content": [row.content for row in rows],
        "caption_id": [row.caption_id for row in rows],
    }
    return score_table(columns, embedding)


class _LastSample:
    """Remembers the key of the last sample that went by."""

    def __init__(self) -> None:
        self.key = ""

    def watch(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """The same samples."""
        for sample in samples:
            self.key = sample.key
            yield sample
