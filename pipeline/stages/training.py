"""The train stage: the proxy runs, and the checkpoints that pairs are scored at."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import Config
from pipeline.data.positions import Positions
from pipeline.engine.progress import Display, Tally
from pipeline.engine.scorer_spec import model_identity
from pipeline.engine.tasks import run_task
from pipeline.errors import ConfigError, StageError
from pipeline.models.manifest import Manifest
from pipeline.replay.ray_train import ProxyJob, train_runs
from pipeline.replay.schedule import TrainingSettings, runs_to_hold_out
from pipeline.stages.job import Job
from pipeline.stages.versions import versions_of
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.pulse import Pulse

if TYPE_CHECKING:
    from pipeline.data.cache import PairCache
    from pipeline.models.clip import PairModel

#: Of what a run's record holds.
_VERSION = 2

#: What is written last, in the folder of the checkpoints.
_TRAINED, _TAKEN_OVER = "trained.json", "imported.json"


def build_proxy(config: Config, run: int) -> PairModel:
    """The proxy of a run at its initial weights."""
    from pipeline.stages.computing import ComputingJob

    return ComputingJob(config).model(run)


@dataclass(frozen=True)
class TrainingPairs:
    """Opens the decoded training pairs on whatever machine it is called on; they are decoded there once.

    It is sent to the workers: it holds no list of pairs, which would grow with the data.

    Attributes:
        config: the run's.
        judged: the pairs that judged models draw from, all but the target held out; else those of the proxy runs.
    """

    config: Config
    judged: bool = False

    def __call__(self) -> PairCache:
        """Build or open the cache; a file lock lets one process per machine build it."""
        from pipeline.data.cache import build_cache
        from pipeline.stages.computing import ComputingJob

        job = ComputingJob(self.config)
        positions, name = training_positions(job), "training"
        if self.judged:
            free = _all_but(job, job.held_out_positions)
            same = free is positions if free is None or positions is None else np.array_equal(free, positions)
            positions, name = (positions, name) if same else (free, "evaluation")
        folder = os.path.join(job.cache_folder, name)
        os.makedirs(folder, exist_ok=True)
        pulse = Pulse(job.folder.decoding)
        with open(os.path.join(folder, "lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cache = build_cache(
                folder,
                job.inventory,
                job.decoder,
                self.config.data.caption,
                positions,
                job.threads,
                lambda rows: pulse.beat({"pairs": rows}),
                job.folder.places,
            )
            pulse.end()
            return cache


def training_pairs(job: Job) -> tuple[TrainingPairs, Config]:
    """The pairs that proxy runs draw from, and the config with `proxy.subset` as a share of these."""
    config = job.config
    if not _is_pool(config):
        return TrainingPairs(config), config
    smaller = config.proxy.model_copy(update={"subset": 1 / config.proxy.runs})
    return TrainingPairs(config), config.model_copy(update={"proxy": smaller})


def training_positions(job: Job) -> Positions | None:
    """The global positions of the pairs that proxy runs draw from, sorted, or None for all.

    The target held out is left out, and what `proxy.within` does not keep. Where the runs together see less than half
    of the pairs, only a seeded pool of that size is decoded.
    """
    proxy, barred = job.config.proxy, job.barred_positions
    if _is_pool(job.config):
        free = job.samples - len(barred)
        return np.sort(job.draw(max(round(proxy.subset * proxy.runs * free), 1), Job.POOL_SEED, barred))
    return _all_but(job, barred)


def _all_but(job: Job, left_out: Positions) -> Positions | None:
    return np.setdiff1d(np.arange(job.samples), left_out) if len(left_out) else None


def _is_pool(config: Config) -> bool:
    return config.proxy.subset * config.proxy.runs < 0.5


def train(job: Job) -> None:
    """Train the proxy runs, or take over the checkpoints given; both end in `checkpoints/manifest.json`."""
    mark, fingerprint = _completion(job)
    if storage.exists(job.folder.checkpoint_manifest) and job.is_current(mark, fingerprint):
        return
    _remove_marks(job)
    if job.config.proxy.checkpoints is None:
        content = {"runs": _train_runs(job)}
    else:
        content = {}
        run_task(_write_taken_over, job.config, stage="train", config=job.config.engine)
    job.write_mark(mark, fingerprint, content)


def require_checkpoints(job: Job) -> None:
    """The stage is complete, with the settings of this config: a list of checkpoints alone may name those of others.

    Raises `StageError`, and `FingerprintError` for checkpoints of other settings with `engine.stale: refuse`.
    """
    if not storage.exists(job.folder.checkpoint_manifest) or not job.is_current(*_completion(job)):
        raise StageError(
            f"no finished checkpoints of these settings in {job.folder.root}: run `diffprune train CONFIG` first"
        )


def check_trained(job: Job) -> None:
    """Where the proxy runs were trained here: it was with the settings of this config. The checkpoints may be gone.

    Raises as `require_checkpoints`.
    """
    if job.config.proxy.checkpoints is None and storage.exists(_mark(job, _TRAINED)):
        require_checkpoints(job)


def _completion(job: Job) -> tuple[str, Fingerprint]:
    """The commit mark of the stage, and what decides the checkpoints."""
    trained = job.config.proxy.checkpoints is None
    name, fingerprint = (_TRAINED, _fingerprint(job)) if trained else (_TAKEN_OVER, _fingerprint_of_others(job))
    return _mark(job, name), fingerprint


def _train_runs(job: Job) -> int:
    """Train; how many runs."""
    config = job.config
    pairs, training = training_pairs(job)
    _check_batch(job, training)
    proxy_job = ProxyJob(training, partial(build_proxy, config), pairs, job.folder, identity=_identity(job))
    steps = TrainingSettings.of(training, max(job.samples, config.proxy.batch_size)).steps * config.proxy.runs
    tally = Tally(steps)
    taken = [0] * config.proxy.runs
    with Display("train", "steps", tally) as display:

        def show(run: int, progress: dict[str, Any]) -> None:
            tally.total = int(progress["steps"]) * config.proxy.runs
            _count(tally, taken, run, int(progress["step"]))
            display.tick()

        tally.total = tally.done = sum(train_runs(proxy_job, show, display.note))
    return config.proxy.runs


def _count(tally: Tally, taken: list[int], run: int, step: int) -> None:
    """A run has taken `step` steps, of which `taken` says for each run what was counted: fewer where it went back to a
    resume point. What is first heard of a run an earlier call may have taken: it counts in no rate."""
    new = step - taken[run]
    if not any(taken):
        tally.begin(new)
    elif not taken[run]:
        tally.done += new
    else:
        for _ in range(new):
            tally.add()
        tally.done += min(new, 0)
    taken[run] = step


def _fingerprint(job: Job) -> Fingerprint:
    """What decides the checkpoints: it answers without a worker whether they are those of this config."""
    config = job.config
    return Fingerprint(
        {
            "version": _VERSION,
            **_identity(job),
            "proxy": config.proxy.model_dump(mode="json", exclude={"gpus_per_worker", "resume_every"}),
            "equal_captions": config.reference.equal_captions,
            "target": config.target.of_pairs if config.target.kind == "holdout" else {},
            "seed": config.seed,
        }
    )


def model_files(config: Config) -> dict[str, str]:
    """Digests of the files that the proxy is built from."""
    model, weights = config.proxy.model, config.proxy.pretrained
    return {
        "model": storage.file_checksum(model) if model.endswith(".json") else "",
        "pretrained": storage.file_checksum(weights) if weights else "",
    }


def _identity(job: Job) -> dict[str, Any]:
    """What a run does not see of what decides it: the pairs there are, those it may not see, and how all are read."""
    config = job.config
    return {
        "inventory": job.inventory_digest,
        "barred": _barred(job)[1],
        **model_files(config),
        "caption": config.data.caption,
        **config.data.pixels,
    }


def _barred(job: Job) -> tuple[int, str]:
    """How many pairs the runs may not see, and their checksum: with `proxy.within` from a task, as they may be many."""
    if job.config.proxy.within is None:
        return _count_barred(job.config)
    return run_task(_count_barred, job.config, stage="train", config=job.config.engine)


def _count_barred(config: Config) -> tuple[int, str]:
    positions = Job(config).barred_positions
    return len(positions), storage.checksum(positions.tobytes())


def _check_batch(job: Job, config: Config) -> None:
    """Before anything is decoded: enough pairs for a batch."""
    TrainingSettings.of(config, round((job.samples - _barred(job)[0]) * config.proxy.subset))


def _fingerprint_of_others(job: Job) -> Fingerprint:
    """What decides checkpoints that are taken over."""
    proxy = job.config.proxy
    return Fingerprint(
        {
            "sources": _sources(job.config),
            "steps": proxy.checkpoint_steps,
            "rates": proxy.checkpoint_rates,
            "model": model_identity(job.config),
            "samples": job.samples,
        }
    )


def _mark(job: Job, name: str) -> str:
    return storage.join(job.folder.checkpoints, name)


def _remove_marks(job: Job) -> None:
    """Before checkpoints are written: those that were trained and those taken over lie in the same places. Directions
    were computed at those before."""
    for url in (job.folder.directions_mark, _mark(job, _TRAINED), _mark(job, _TAKEN_OVER)):
        storage.remove(url)


def _sources(config: Config) -> list[Any]:
    """Which version of each file is taken over; of a manifest, its content and the files that it lists."""
    urls = config.proxy.checkpoints or []
    found: list[Any] = [*zip(urls, versions_of(urls, "train", config.engine), strict=True)]
    if len(urls) == 1 and urls[0].endswith(".json"):
        listed = [entry.path for entry in Manifest.read(urls[0]).checkpoints]
        found += [storage.file_checksum(urls[0]), *versions_of(listed, "train", config.engine)]
    return found


def _write_taken_over(config: Config) -> None:
    from pipeline.stages.computing import take_over_checkpoints

    take_over_checkpoints(config)


def check_checkpoints(config: Config) -> None:
    """Before any work: the checkpoint files that the config names are there. Raises `ConfigError`."""
    for number, url in enumerate(config.proxy.checkpoints or []):
        if not storage.exists(url):
            raise ConfigError("expected a checkpoint file", key=f"proxy.checkpoints[{number}]", found=url)


def check_held_out(config: Config) -> None:
    """Before any work: with `score.held_out` there is, for every pair, a run that does not train on it.

    Raises `ConfigError`.
    """
    if not config.score.held_out:
        return
    proxy = config.proxy
    if proxy.checkpoints is not None:
        raise ConfigError(
            "expected proxy runs trained here: which pairs other checkpoints saw is not known", key="score.held_out"
        )
    needed = runs_to_hold_out(proxy.subset)
    if not needed:
        raise ConfigError("expected less than 1 with score.held_out: true", key="proxy.subset", found=proxy.subset)
    if proxy.runs < needed:
        raise ConfigError(
            f"expected at least {needed} with score.held_out: true and proxy.subset: {proxy.subset:g}",
            key="proxy.runs",
            found=proxy.runs,
        )
