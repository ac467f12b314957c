"""The directions stage: has R, B and V drawn, and computed per checkpoint what every pair is scored along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.device import gpus_for_a_task
from pipeline.engine.scorer_spec import model_identity
from pipeline.engine.tasks import run_task, run_tasks
from pipeline.models.manifest import Manifest
from pipeline.patience import Patience
from pipeline.stages.job import Job
from pipeline.stages.versions import shard_versions
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.task_marks import TaskMarks

#: Of what the directions' files hold.
_VERSION = 4


def compute_directions(job: Job) -> None:
    """Write `directions/`: the decoded batches, a plan per checkpoint, and last `manifest.json`.

    For the checkpoints that are there: whether they are of this config's settings `require_checkpoints` says.
    """
    manifest = Manifest.read(job.folder.checkpoint_manifest)
    digests = [storage.file_checksum(entry.path) for entry in manifest.checkpoints]
    fingerprint = directions_fingerprint(job, digests, manifest.dataset_size)
    if job.is_current(job.folder.directions_mark, fingerprint):
        return
    storage.remove(job.folder.directions_mark)
    marks = TaskMarks(storage.join(job.folder.directions, "marks"), fingerprint)
    marks.invalidate_all()
    patience = Patience.of_computing(job.config.engine.task_timeout)
    drawn = run_task(_draw, job.config, stage="directions", config=job.config.engine, patience=patience)
    parts, files = drawn["parts"], drawn["files"]
    outcome = run_tasks(
        _write_plans,
        [_Part(job.config, tuple(part)) for part in parts],
        run=job.folder,
        stage="directions",
        config=job.config.engine,
        on_result=lambda number, written: files.update(written),
        name=lambda part: f"checkpoint {', '.join(str(number) for number in part.numbers)}",
        marks=marks,
        unit="checkpoints" if len(parts) == len(manifest.checkpoints) else "runs",
        gpus=gpus_for_a_task(job.config.engine.gpus_per_worker),
        patience=patience,
    )
    outcome.check("directions")
    content = {
        "checkpoints": digests,
        "dataset_size": manifest.dataset_size,
        "basis": drawn["basis"],
        "files": dict(sorted(files.items())),
    }
    job.write_mark(job.folder.directions_mark, fingerprint, content)


def directions_fingerprint(job: Job, digests: list[str], dataset_size: int) -> Fingerprint:
    """What decides the directions.

    Args:
        job: the run.
        digests: of the checkpoints' contents, in manifest order.
        dataset_size: the manifest's.
    """
    config = job.config
    left_out = {"batch_size", "compile", "embeddings", "held_out", "sample", "min_correlation"}
    score = config.score.model_dump(mode="json", exclude=left_out)
    return Fingerprint(
        {
            "version": _VERSION,
            "inventory": job.inventory_digest,
            "checkpoints": digests,
            "dataset_size": dataset_size,
            "model": model_identity(config),
            "score": score,
            "loss": config.proxy.loss,
            "reference": config.reference.model_dump(mode="json"),
            "target": config.target.of_pairs | config.target.of_loss,
            "target_versions": shard_versions(config.target.shards, "target.shards", "directions", config.engine),
            "caption": config.data.caption,
            **config.data.pixels,
            "seed": config.seed,
        }
    )


@dataclass(frozen=True)
class _Part:
    """Checkpoints whose plans one task computes: places in the manifest."""

    config: Config
    numbers: tuple[int, ...]


def _draw(config: Config) -> dict[str, Any]:
    from pipeline.stages.plans import parts_of, write_batches

    return {**write_batches(config), "parts": parts_of(config)}


def _write_plans(part: _Part) -> dict[str, str]:
    from pipeline.stages.plans import write_plans

    return write_plans(part.config, part.numbers)
