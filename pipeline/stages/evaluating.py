"""The evaluate stage: models trained on what was kept and on baselines of the same size, at equal steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from pipeline.config import Config
from pipeline.data.sampling import Positions
from pipeline.engine.tasks import run_tasks
from pipeline.errors import ConfigError
from pipeline.evaluation.subsets import Result, train_and_measure
from pipeline.evaluation.zeroshot import load_held_out
from pipeline.stages.evaluation_sets import training_sets
from pipeline.stages.job import Job
from pipeline.stages.training import build_proxy, evaluation_pairs, model_files
from pipeline.store import marks, storage
from pipeline.store.fingerprint import Fingerprint

#: Keys of `proxy` that decide nothing about the training of a judged model.
_OF_THE_PROXY_ALONE = {
    "checkpoints", "checkpoint_steps", "checkpoint_rates", "runs", "subset", "within", "num_checkpoints",
    "checkpoint_at", "augment", "workers", "gpus_per_worker", "resume_every",
}  # fmt: skip


@dataclass(frozen=True)
class _Training:
    """One model to train: its set, the positions it may see, the seed, and the mark that its result goes to."""

    config: Config
    set: str
    positions: Positions
    seed: int
    fingerprint: Fingerprint

    def __str__(self) -> str:
        return f"{self.set}, seed {self.seed}"

    @property
    def mark(self) -> str:
        """Trainings of the same pairs with the same settings share a mark, whatever the set is called."""
        return storage.join(self.config.out, "evaluation", "trainings", f"{self.fingerprint.digest}.json")


def evaluate(job: Job) -> list[Result]:
    """Train and measure every set, write `evaluation/results.json` and return its rows.

    A training that is done is not repeated: sets, sizes and seeds may be added later.
    Raises `ConfigError` without `evaluate.shards`, `StageError` before the selection is finished.
    """
    config = job.config
    if config.evaluate is None or config.evaluate.shards is None:
        raise ConfigError("expected shards to measure on", key="evaluate.shards")
    sets = list(training_sets(job))
    seeds = range(config.evaluate.seeds)
    trainings = [_training(job, each.name, each.positions(seed), seed) for each in sets for seed in seeds]
    pending = {training.mark: training for training in trainings if marks.read_mark(training.mark) is None}
    outcome = run_tasks(
        _train,
        list(pending.values()),
        run=job.folder,
        stage="evaluate",
        config=config.engine,
        on_result=lambda number, result: None,
        unit="trainings",
        gpus=float(ray.cluster_resources().get("GPU", 0) > 0),  # type: ignore[no-untyped-call]
    )
    outcome.check("evaluate")
    found = {training.mark: storage.read_json(training.mark) for training in trainings}
    results = []
    for number, each in enumerate(sets):
        mine = [found[training.mark] for training in trainings[number * len(seeds) : (number + 1) * len(seeds)]]
        values = [mark["value"] for mark in mine]
        results.append(Result.of(each.name, each.series, mine[0]["size"], mine[0]["metric"], values))
    storage.write_json(
        storage.join(job.folder.root, "evaluation", "results.json"),
        {"rows": [_without_nan(asdict(result)) for result in results]},
    )
    return results


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _training(job: Job, name: str, positions: Positions, seed: int) -> _Training:
    config = job.config
    assert config.evaluate is not None
    fingerprint = Fingerprint(
        {
            "shards": config.evaluate.shards,
            "steps": config.evaluate.steps,
            "augment": config.evaluate.augment,
            "proxy": config.proxy.model_dump(mode="json", exclude=_OF_THE_PROXY_ALONE),
            **model_files(config),
            "equal_captions": config.reference.equal_captions,
            "caption": config.data.caption,
            "max_pixels": config.data.max_pixels,
            "inventory": job.inventory_digest,
            "positions": storage.checksum(positions.tobytes()),
            "seed": [config.seed, seed],
        }
    )
    return _Training(config, name, positions, seed, fingerprint)


def _train(training: _Training) -> None:
    config = training.config
    assert config.evaluate is not None  # checked before any task
    assert config.evaluate.shards is not None
    job = Job(config)
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    cache = evaluation_pairs(job)()
    rows = np.flatnonzero(np.isin(cache.positions, training.positions))
    held_out = load_held_out(config.evaluate.shards, job.decoder, config.data.caption, job.threads)
    device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
    value = train_and_measure(config, partial(build_proxy, config), cache, rows, held_out, training.seed, device)
    result = {"set": str(training), "metric": held_out.metric, "size": len(rows), "value": value}
    marks.write_mark(training.mark, training.fingerprint, result)
