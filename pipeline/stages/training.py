"""The inventory and the proxy run: which pairs there are, and the checkpoints that they are scored at."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo, inspect_shard, read_inventory, write_inventory
from pipeline.data.positions import Positions
from pipeline.data.shards import expand
from pipeline.engine.progress import Display, Tally, say
from pipeline.engine.scorer_spec import model_identity
from pipeline.engine.tasks import run_task, run_tasks
from pipeline.errors import ConfigError, FingerprintError, InputError
from pipeline.models.manifest import Manifest
from pipeline.patience import Patience
from pipeline.replay.ray_train import ProxyJob, train_runs
from pipeline.replay.schedule import TrainingSettings, runs_to_hold_out
from pipeline.stages.job import Job
from pipeline.stages.versions import changed_since, versions_of
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.pulse import Pulse
from pipeline.store.task_marks import TaskMarks
from pipeline.text import plural

if TYPE_CHECKING:
    from pipeline.data.cache import PairCache
    from pipeline.models.clip import PairModel

#: What to do where a run's folder holds results of other shards.
_WAYS_OUT = "use another run folder, or engine.stale=redo to replace what was made of them"

#: Of what a run's record holds.
_VERSION = 2

#: What is written last, in the folder of the checkpoints.
_TRAINED, _TAKEN_OVER = "trained.json", "imported.json"


def take_inventory(job: Job) -> None:
    """Write `inventory.parquet`: one row per shard; shards counted by an interrupted call are not read again."""
    urls = expand(job.config.data.shards)
    found = _known_shards(job, urls)
    left = [number for number in range(len(urls)) if number not in found]
    if not left:
        return

    def keep(number: int, info: list[Any]) -> None:
        found[left[number]] = ShardInfo(*info)

    # Every mark holds the parts of its fingerprint, and every task its marks: a digest, not the list of all shards.
    counted = Fingerprint({"shards": Fingerprint({"urls": urls, "left": left}).digest})
    marks = TaskMarks(storage.join(job.folder.root, "scratch", "inventory"), counted)
    outcome = run_tasks(
        _inspect,
        [(number, urls[number], job.folder.places(number)) for number in left],
        run=job.folder,
        stage="inventory",
        config=job.config.engine,
        on_result=keep,
        name=lambda item: item[1],
        marks=marks if len(left) > 1 else None,
        unit="shards",
        patience=Patience(job.config.engine.shard_timeout),
    )
    outcome.check("inventory")
    if not any(info.samples for info in found.values()):
        first = found[0]
        reason = f" ({first.end_error})" if first.end_error else ""
        raise InputError(f"{first.url}: expected image-text pairs, found none here{reason} or in any other shard")
    write_inventory(job.folder.inventory, [found[number] for number in range(len(urls))])
    storage.remove_folder(marks.folder)
    _warn_of_equal_names(urls)


def _warn_of_equal_names(urls: list[str]) -> None:
    """Say so where shards of different folders have one file name: a made-up uid consists of file name and key."""
    name, shards = Counter(map(storage.basename, urls)).most_common(1)[0]
    if shards > 1:
        say(
            "inventory",
            f"warning: {plural(shards, 'shard')} are named {name}: pairs in them that have one key and no uid of "
            "their own are taken for one pair wherever uids count (uids.npy, draws, evaluate.truth); give them names "
            "of their own",
        )


def _known_shards(job: Job, urls: list[str]) -> dict[int, ShardInfo]:
    """Shards of the inventory that need not be counted again: those of the same list that are as they were.

    Raises `FingerprintError` where one has changed, or where checkpoints or scores were made of another list, with
    `engine.stale: refuse`.
    """
    if not storage.exists(job.folder.inventory):
        return {}
    refuse = job.config.engine.stale == "refuse"
    known = read_inventory(job.folder.inventory)
    before = [info.url for info in known]
    if before != urls:
        if refuse and _is_used(job):
            raise FingerprintError(
                f"{job.folder.inventory} lists other shards than the config ({_difference(before, urls)}), and "
                f"checkpoints or scores were made of them: {_WAYS_OUT}"
            )
        return {}
    changed = changed_since(known, "inventory", job.config.engine)
    if changed and refuse:
        others = f", and so for {plural(len(changed) - 1, 'other shard')}" if len(changed) > 1 else ""
        raise FingerprintError(f"{changed[0][1]}{others}: put them back, or {_WAYS_OUT}")
    numbers = {info.index for info, _ in changed}
    return {info.index: info for info in known if info.index not in numbers}


def _is_used(job: Job) -> bool:
    """Whether something was made of the shards of the inventory."""
    return storage.exists(job.folder.checkpoint_manifest) or bool(storage.list_files(job.folder.scores, ".json"))


def _difference(before: list[str], now: list[str]) -> str:
    """How two lists of shards differ, with an example."""
    lost, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    found = [f"{len(urls):,} {verb}, {urls[0]} for one" for urls, verb in ((lost, "left out"), (new, "added")) if urls]
    return "; ".join(found) or "the same ones in another order"


def _inspect(item: tuple[int, str, str]) -> list[Any]:
    info = inspect_shard(*item)
    return [info.index, info.url, info.name, info.samples, info.bytes, info.etag, info.end_error]


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
    config = job.config
    if config.proxy.checkpoints is not None:
        _take_over(job)
        return
    fingerprint = _fingerprint(job)
    mark = _mark(job, _TRAINED)
    if storage.exists(job.folder.checkpoint_manifest) and job.is_current(mark, fingerprint):
        return
    _remove_marks(job)
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
    job.write_mark(mark, fingerprint, {"runs": config.proxy.runs})


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


def _take_over(job: Job) -> None:
    config, proxy = job.config, job.config.proxy
    fingerprint = Fingerprint(
        {
            "sources": _sources(config),
            "steps": proxy.checkpoint_steps,
            "rates": proxy.checkpoint_rates,
            "model": model_identity(config),
            "samples": job.samples,
        }
    )
    mark = _mark(job, _TAKEN_OVER)
    if storage.exists(job.folder.checkpoint_manifest) and job.is_current(mark, fingerprint):
        return
    _remove_marks(job)
    run_task(_write_taken_over, config, stage="train", config=config.engine)
    job.write_mark(mark, fingerprint, {})


def has_checkpoints(job: Job) -> bool:
    """Whether the stage is complete: a list of checkpoints alone may name those of other settings, too."""
    marks = (_mark(job, name) for name in (_TRAINED, _TAKEN_OVER))
    return storage.exists(job.folder.checkpoint_manifest) and any(map(storage.exists, marks))


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
