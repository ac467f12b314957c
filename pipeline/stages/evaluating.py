"""The evaluate stage: models trained on what was kept and on baselines of the same size, at equal steps."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from itertools import groupby

from pipeline.config import Config
from pipeline.data.shards import also_measured_on
from pipeline.device import gpus_for_a_task
from pipeline.engine.progress import say
from pipeline.engine.tasks import run_task, run_tasks
from pipeline.evaluation.results import Result
from pipeline.patience import Patience
from pipeline.stages.evaluation_sets import WrittenSet, write_sets
from pipeline.stages.job import Job
from pipeline.stages.training import model_files
from pipeline.stages.versions import Version, shard_versions
from pipeline.store import ahead, marks, storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.pulse import read_pulse, share_done
from pipeline.text import plural

#: Keys of `proxy` that decide nothing about the training of a judged model.
_OF_THE_PROXY_ALONE = {
    "checkpoints", "checkpoint_steps", "checkpoint_rates", "runs", "subset", "within", "num_checkpoints",
    "checkpoint_at", "augment", "workers", "gpus_per_worker", "resume_every",
}  # fmt: skip


@dataclass(frozen=True)
class _Training:
    """One model to train: the pairs it may see, and the mark that its result goes to."""

    config: Config
    pairs: WrittenSet
    fingerprint: Fingerprint

    def __str__(self) -> str:
        return f"{self.pairs.name}, seed {self.pairs.seed}"

    @property
    def board(self) -> str:
        """What trackers call it: letters, digits and dashes."""
        return re.sub(r"[^0-9A-Za-z]+", "-", str(self)).strip("-")

    @property
    def pulse(self) -> str:
        """How far it is, while it is trained."""
        return storage.join(self.config.out, "evaluation", "progress", f"{self.fingerprint.digest}.json")

    @property
    def mark(self) -> str:
        """Trainings of the same pairs with the same settings share a mark, whatever the set is called."""
        return storage.join(self.config.out, "evaluation", "trainings", f"{self.fingerprint.digest}.json")


def evaluate(job: Job) -> list[Result]:
    """Train and measure every set, write `evaluation/results.json` and return its rows.

    A training that is done is not repeated: sets, sizes and seeds may be added later.
    Raises `StageError` before the selection is finished.
    """
    config = job.config
    assert config.evaluate is not None
    _warn_of_shared_shards(config)
    sets = run_task(write_sets, config, stage="evaluate", config=config.engine)
    measured = shard_versions(config.evaluate.shards, "evaluate.shards", "evaluate", config.engine)
    trainings = [_training(job, each, measured) for each in sets]
    pending = {training.mark: training for training in trainings if marks.read_mark(training.mark) is None}
    # What trainings that were interrupted said of themselves is not true of new ones.
    ahead.each(storage.remove, [training.pulse for training in pending.values()])
    outcome = run_tasks(
        _train,
        list(pending.values()),
        run=job.folder,
        stage="evaluate",
        config=config.engine,
        on_result=lambda number, result: None,
        unit="trainings",
        gpus=gpus_for_a_task(config.proxy.gpus_per_worker),
        patience=Patience.of_computing(config.engine.task_timeout),
        pulse=lambda training: (read_pulse(training.pulse), read_pulse(job.folder.decoding)),
        begun=lambda pulse: share_done(pulse[0]),
    )
    outcome.check("evaluate")
    results = []
    for (series, name, share), group in groupby(trainings, key=_set_of):
        mine = [storage.read_json(training.mark) for training in group]
        values = [mark["value"] for mark in mine]
        results.append(Result.of(name, series, share, mine[0]["size"], mine[0]["metric"], values))
    storage.write_json(
        storage.join(job.folder.root, "evaluation", "results.json"),
        {"rows": [storage.without_nan(asdict(result)) for result in results]},
    )
    return results


def _set_of(training: _Training) -> tuple[str, str, float | None]:
    return training.pairs.series, training.pairs.name, training.pairs.share


def _warn_of_shared_shards(config: Config) -> None:
    """Say so where models are measured on pairs that they are trained on, or that the choice was made for."""
    for key, shared in also_measured_on(config).items():
        named = f"{plural(len(shared), 'shard')} of evaluate.shards, {min(shared)} first, also named by {key}"
        say("evaluate", f"{named}: results are biased, as these pairs were used already")


def _training(job: Job, pairs: WrittenSet, measured: list[Version]) -> _Training:
    config = job.config
    assert config.evaluate is not None
    fingerprint = Fingerprint(
        {
            "shards": measured,
            "steps": config.evaluate.steps,
            "augment": config.evaluate.augment,
            "proxy": config.proxy.model_dump(mode="json", exclude=_OF_THE_PROXY_ALONE),
            **model_files(config),
            "equal_captions": config.reference.equal_captions,
            "caption": config.data.caption,
            **config.data.pixels,
            "inventory": job.inventory_digest,
            "positions": pairs.checksum,
            "seed": [config.seed, pairs.seed],
        }
    )
    return _Training(config, pairs, fingerprint)


def _train(training: _Training) -> None:
    from pipeline.stages.subset_training import train_on

    pairs = training.pairs
    done = train_on(training.config, training.board, pairs.file, pairs.seed, training.pulse)
    result = {"set": str(training), **done}
    marks.write_mark(training.mark, training.fingerprint, result)
