"""The directions stage: draws R, B and V, and computes per checkpoint what every pair is scored along."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import torch

from pipeline.config import Config
from pipeline.data.inventory import inspect_shard
from pipeline.data.sampling import Positions, draw_positions, load_pairs
from pipeline.data.shards import expand
from pipeline.engine.tasks import run_tasks
from pipeline.errors import InputError, StageError
from pipeline.influence import Batches, Replay, StepRule, prepare, prepare_run
from pipeline.influence.settings import WHOLE_RUN
from pipeline.models.manifest import Manifest
from pipeline.prepared import load_batches, save_batches, save_plan, settings_of
from pipeline.replay.record import Record
from pipeline.run import RunFolder
from pipeline.stages.job import OVERDRAW, Job
from pipeline.stages.training import training_pairs
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.task_marks import TaskMarks
from pipeline.types import PairBatch


def compute_directions(job: Job) -> None:
    """Write `directions/`: the decoded batches, a plan per checkpoint, and last `manifest.json`."""
    manifest = _manifest(job)
    digests = [storage.file_checksum(entry.path) for entry in manifest.checkpoints]
    fingerprint = _fingerprint(job, digests)
    if job.is_current(job.folder.directions_mark, fingerprint):
        return
    storage.remove(job.folder.directions_mark)
    save_batches(job.folder.root, draw_batches(job))
    if settings_of(job.config).estimator in WHOLE_RUN:
        parts = [[n for n, entry in enumerate(manifest.checkpoints) if entry.run == run] for run in manifest.runs]
    else:
        parts = [[number] for number in range(len(manifest.checkpoints))]
    outcome = run_tasks(
        _compute,
        [_Part(job.config, tuple(part)) for part in parts],
        run=job.folder,
        stage="directions",
        config=job.config.engine,
        on_result=lambda number, result: None,
        name=lambda part: f"checkpoint {', '.join(str(number) for number in part.numbers)}",
        marks=TaskMarks(storage.join(job.folder.directions, "marks"), fingerprint),
        unit="checkpoints" if len(parts) == len(manifest.checkpoints) else "runs",
        gpus=float(ray.cluster_resources().get("GPU", 0) > 0),  # type: ignore[no-untyped-call]
    )
    outcome.check("directions")
    job.write_mark(job.folder.directions_mark, fingerprint, {"checkpoints": digests})


def _manifest(job: Job) -> Manifest:
    if not storage.exists(job.folder.checkpoint_manifest):
        raise StageError(f"no finished checkpoints in {job.folder.root}: run `diffprune train CONFIG` first")
    return Manifest.read(job.folder.checkpoint_manifest)


def _fingerprint(job: Job, digests: list[str]) -> Fingerprint:
    config = job.config
    score = config.score.model_dump(mode="json", exclude={"batch_size", "embeddings", "held_out"})
    return Fingerprint(
        {
            "inventory": job.inventory_digest,
            "checkpoints": digests,
            "score": score,
            "loss": config.proxy.loss,
            "reference": config.reference.model_dump(mode="json"),
            "target": config.target.model_dump(mode="json"),
            "caption": config.data.caption,
            "max_pixels": config.data.max_pixels,
            "seed": config.seed,
        }
    )


def draw_batches(job: Job) -> Batches:
    """R, B and V of a run, by its seed. Raises `InputError` when too few pairs can be read."""
    sizes, target = job.config.reference, job.config.target

    def draw(count: int, seed: int, key: str) -> PairBatch:
        return _load(job, job.draw(int(count * OVERDRAW) + 16, seed, job.barred_positions), count, key)

    reference = draw(sizes.pairs, Job.REFERENCE_SEED, "reference.pairs")
    gradient = draw(sizes.gradient_pairs, Job.GRADIENT_SEED, "reference.gradient_pairs")
    if target.kind == "train":
        return Batches(reference, gradient, draw(target.pairs, Job.TARGET_SEED, "target.pairs"))
    if target.kind == "holdout":
        held_out = job.held_out_positions
        return Batches(reference, gradient, _load(job, held_out, target.pairs, "target.pairs"))
    urls = expand(target.shards or [], "target.shards")
    shards = [inspect_shard(index, url) for index, url in enumerate(urls)]
    total = sum(shard.samples for shard in shards)
    positions = draw_positions(total, int(target.pairs * OVERDRAW) + 16, job.config.seed + Job.TARGET_SEED)
    caption = target.caption or job.config.data.caption
    pairs, _ = load_pairs(shards, positions, job.decoder, caption, job.threads, target.prompt)
    return Batches(reference, gradient, _enough(pairs, target.pairs, "target.pairs"))


def _load(job: Job, positions: Positions, count: int, key: str) -> PairBatch:
    pairs, _ = load_pairs(job.inventory, positions, job.decoder, job.config.data.caption, job.threads)
    return _enough(pairs, count, key)


def _enough(pairs: PairBatch, count: int, key: str) -> PairBatch:
    if len(pairs) < 2:
        raise InputError(f"{key}: expected {count} readable pairs, found {len(pairs)}")
    return pairs[:count]


@dataclass(frozen=True)
class _Part:
    """Checkpoints whose plans one task computes: places in the manifest."""

    config: Config
    numbers: tuple[int, ...]


def _compute(part: _Part) -> None:
    config = part.config
    folder = RunFolder(config.out)
    manifest = Manifest.read(folder.checkpoint_manifest)
    settings = settings_of(config)
    job = Job(config)
    model = job.model()
    checkpoints = [manifest.checkpoints[number].load(model) for number in part.numbers]
    model = model.to("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
    batches = load_batches(config.out)
    runs = len(manifest.runs)
    if settings.estimator in WHOLE_RUN:
        replay = None
        if settings.estimator == "unrolled" and settings.replay == "exact":
            replay = exact_replay(job, checkpoints[0].run)
        plans = prepare_run(
            model,
            checkpoints,
            batches,
            settings,
            dataset_size=manifest.dataset_size,
            num_runs=runs,
            replay=replay,
        )
    else:
        plans = [
            prepare(
                model,
                checkpoint,
                batches,
                settings,
                dataset_size=manifest.dataset_size,
                num_checkpoints=len(manifest.of_run(checkpoint.run)),
                num_runs=runs,
            )
            for checkpoint in checkpoints
        ]
    for number, plan in zip(part.numbers, plans, strict=True):
        save_plan(config.out, number, plan)


def exact_replay(job: Job, run: int) -> Replay:
    """What an exact replay needs of a run trained here. Raises `StageError`, `InputError` where it cannot be exact."""
    record = Record.read(job.folder, run)
    if not record.exact:
        raise InputError(
            "score.replay: exact repeats training in eval() mode, which this model (dropout or batch statistics) does "
            "not compute: use score.replay: checkpoints"
        )
    pairs, _ = training_pairs(job)
    cache = pairs()
    initial = record.initial(job.model(run))
    settings = record.settings
    rule = StepRule(
        optimizer=settings.optimizer,
        weight_decay=record.weight_decay(initial.params),
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        momentum=settings.momentum,
        grad_clip=settings.grad_clip,
    )
    return Replay(rule, [float(rate) for rate in record.rates], lambda step: record.pairs(cache, step), initial)
