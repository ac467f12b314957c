"""The score stage: hands every shard to the engine, and refuses to start before the directions are there."""

from __future__ import annotations

from pipeline.engine.scoring import Outcome, score_shards
from pipeline.engine.shard_scorer import ScorerSpec, score_fingerprint
from pipeline.errors import StageError
from pipeline.prepared import load_batches
from pipeline.stages.job import Job
from pipeline.store import marks, storage
from pipeline.store.fingerprint import Fingerprint


def score(job: Job, *, retry_failed: bool = False) -> Outcome:
    """Score every shard that is not committed yet. Failed shards are in the outcome; too many raise `StageError`."""
    config = job.config
    fingerprint = scores_fingerprint(job)
    outcome = score_shards(
        ScorerSpec(config, fingerprint),
        job.inventory,
        job.folder,
        fingerprint,
        config.engine,
        retry_failed=retry_failed,
    )
    outcome.check(config.engine.allowed_failures, storage.join(job.folder.root, "failed"))
    return outcome


def scores_fingerprint(job: Job) -> Fingerprint:
    """What decides the scores of the run, without a shard. Raises `StageError` before the directions are complete."""
    mark = marks.read_mark(job.folder.directions_mark)
    if mark is None:
        raise StageError(f"no finished directions in {job.folder.root}: run `diffprune directions CONFIG` first")
    batches = load_batches(job.folder.root)
    return score_fingerprint(job.config, mark["checkpoints"], batches, job.decoder.spec)
