"""The score stage: hands every shard to the engine, and refuses to start before the directions are there."""

from __future__ import annotations

from pipeline.engine.outcome import Outcome
from pipeline.engine.scorer_spec import ScorerSpec, score_fingerprint
from pipeline.engine.scoring import score_shards
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.stages.amortising import score_amortised
from pipeline.stages.directions import directions_fingerprint
from pipeline.stages.job import Job
from pipeline.store import marks, storage
from pipeline.store.commits import remove_strangers
from pipeline.store.fingerprint import Fingerprint


def score(job: Job, *, retry_failed: bool = False) -> Outcome:
    """Score every shard that is not committed yet. Failed shards are in the outcome; too many raise `StageError`."""
    config = job.config
    fingerprint = scores_fingerprint(job)
    for folder in (job.folder, RunFolder(job.folder.sample)):
        remove_strangers(folder, len(job.inventory))
    if config.score.sample < 1:
        outcome = score_amortised(job, fingerprint, retry_failed=retry_failed)
    else:
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
    """What decides the scores of the run (of amortised ones, those computed), without a shard.

    Raises `StageError` before the directions are complete, `FingerprintError` when they are of other settings.
    """
    found = known_fingerprint(job)
    if found is None:
        raise StageError(f"no finished directions in {job.folder.root}: run `diffprune directions CONFIG` first")
    return found


def known_fingerprint(job: Job) -> Fingerprint | None:
    """As `scores_fingerprint`; None before the directions are complete, or where they are to be done again."""
    url = job.folder.directions_mark
    mark = marks.read_mark(url)
    if mark is None:
        return None
    fingerprint = directions_fingerprint(job, mark["checkpoints"], mark.get("dataset_size", 0))
    if not marks.is_current(url, mark, fingerprint, job.config.engine.stale):
        return None
    return score_fingerprint(job.config, mark["checkpoints"], mark["basis"])
