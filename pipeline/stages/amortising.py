"""Amortised scoring: a sample of the pairs is scored, a regressor fitted on it, and the others' scores predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline import text
from pipeline.config import Config
from pipeline.data.inventory import ShardInfo
from pipeline.engine.failures import read_aside, set_aside
from pipeline.engine.outcome import Outcome
from pipeline.engine.scorer_spec import PredictorSpec, SampleSpec
from pipeline.engine.scoring import score_shards
from pipeline.engine.tasks import run_tasks
from pipeline.errors import StageError
from pipeline.models.manifest import Manifest
from pipeline.patience import Patience
from pipeline.run import RunFolder
from pipeline.stages.job import Job
from pipeline.store import marks, storage
from pipeline.store.commits import committed, judged, shard_fingerprint, withdraw
from pipeline.store.fingerprint import Fingerprint

#: Scored pairs that a regressor is fitted on at most.
MOST_PAIRS = 32_768


def score_amortised(job: Job, sampled: Fingerprint, *, retry_failed: bool) -> Outcome:
    """Score a sample of every shard, fit a regressor, and complete the scores of every shard that has none yet.

    Args:
        job: the run.
        sampled: of the scores of the sample, without a shard.
        retry_failed: take up the shards again that an earlier call set aside.

    Raises `StageError` when predicted scores correlate less with computed ones than `score.min_correlation`.
    """
    config, folder = job.config, job.folder
    mark = marks.read_mark(folder.regressor_mark)
    if not marks.is_current(folder.regressor_mark, mark, sampled, config.engine.stale):
        storage.remove(folder.regressor_mark)
        mark = None
    done: set[int] = set()
    if mark is None:
        there = judged(folder, job.inventory, sampled, config.engine.stale)
        withdraw(folder, [score.shard for score, _ in there])  # computed in full, or predicted by another regressor
    else:
        done = {score.shard for score in committed(folder, job.inventory, _final(sampled, mark), config.engine.stale)}
    _forget_lost_samples(folder)
    first = score_shards(
        SampleSpec(config, sampled),
        [shard for shard in job.inventory if shard.index not in done],
        RunFolder(folder.sample),
        sampled,
        config.engine,
        retry_failed=retry_failed,
        title="sample",
    )
    if mark is None:
        first.check(config.engine.allowed_failures, storage.join(folder.sample, "failed"))
        mark = _fit(job, sampled)
    _check(mark, config)
    final = _final(sampled, mark)
    _hand_on_failures(job, first, final, retry_failed)
    return score_shards(
        PredictorSpec(config, final, sampled, _runs(job), mark["error"]),
        job.inventory,
        folder,
        final,
        config.engine,
        title="predict",
    )


def _runs(job: Job) -> tuple[int, ...]:
    return tuple(entry.run for entry in Manifest.read(job.folder.checkpoint_manifest).checkpoints)


def _final(sampled: Fingerprint, mark: dict[str, Any]) -> Fingerprint:
    """Of the completed scores: what decided the sample's, and the regressor's content."""
    return Fingerprint({**sampled.parts, "regressor": mark["regressor"]})


def _forget_lost_samples(folder: RunFolder) -> None:
    """A shard that was set aside and whose sample has no mark gets a new sample: the second pass takes it up again."""
    for url in storage.list_files(storage.join(folder.root, "failed"), ".json"):
        aside = read_aside(url)
        if aside is not None and marks.read_mark(RunFolder(folder.sample).score_mark(aside.item)) is None:
            storage.remove(url)


def _hand_on_failures(job: Job, first: Outcome, final: Fingerprint, retry_failed: bool) -> None:
    """A shard without a sample is set aside for the second pass too, for the same reason."""
    if retry_failed:
        for url in storage.list_files(storage.join(job.folder.root, "failed"), ".json"):
            if read_aside(url) is not None:
                storage.remove(url)
    shards = {shard.index: shard for shard in job.inventory}
    for aside in first.failed:
        digest = shard_fingerprint(final, shards[aside.item]).digest
        set_aside(job.folder.failure_file(aside.item), replace(aside, fingerprint=digest))


def _check(mark: dict[str, Any], config: Config) -> None:
    last = mark["curve"][-1]
    if last["correlation"] >= config.score.min_correlation:
        return
    raise StageError(
        f"score.sample: predicted {config.score.estimator} scores have a rank correlation of "
        f"{last['correlation']:.3f} ({last['low']:.3f} to {last['high']:.3f}) with computed ones, on held-out pairs of "
        f"the {mark['pairs']:,} sampled ({text.percent(config.score.sample)} of all); expected "
        f"{config.score.min_correlation:g} (score.min_correlation) or more: raise score.sample, or score every pair "
        "with score.sample: 1"
    )


def _fit(job: Job, sampled: Fingerprint) -> dict[str, Any]:
    """Fit in a task of its own, write regressor and mark; returns the mark's content."""
    there = {mark.shard for mark in committed(RunFolder(job.folder.sample), job.inventory, sampled, "redo")}
    shards = [shard for shard in job.inventory if shard.index in there]
    found: dict[int, dict[str, Any]] = {}
    outcome = run_tasks(
        _fit_regressor,
        [(job.config, sampled, _runs(job), tuple(_spread(shards, MOST_PAIRS / job.config.score.sample)))],
        run=job.folder,
        stage="fit",
        config=job.config.engine,
        on_result=found.__setitem__,
        name=lambda item: "the regressor",
        unit="regressors",
        patience=Patience.of_computing(job.config.engine.task_timeout),
    )
    outcome.check("fit")
    storage.remove_temporary(job.folder.sample)
    job.write_mark(job.folder.regressor_mark, sampled, found[0])
    return found[0]


def _fit_regressor(item: tuple[Config, Fingerprint, tuple[int, ...], tuple[ShardInfo, ...]]) -> dict[str, Any]:
    from pipeline.stages.fitting import fit_regressor

    config, sampled, runs, shards = item
    return fit_regressor(config, sampled, np.array(runs), shards, MOST_PAIRS)


def _spread(shards: Sequence[ShardInfo], pairs: float) -> list[ShardInfo]:
    """All shards, or evenly spread ones that together hold about so many pairs."""
    total = sum(shard.samples for shard in shards)
    count = len(shards) if total <= pairs else max(1, round(len(shards) * pairs / total))
    return [shards[place * len(shards) // count] for place in range(count)]
