"""Proxy runs on a Ray cluster: one worker per run in plain tasks side by side, several per run through `ray.train`.

The driver loads neither torch nor `ray.train`: functions that run in a task import what they need.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import Config
from pipeline.errors import DiffpruneError, StageError
from pipeline.replay.files import RecordFolder
from pipeline.replay.schedule import Rows
from pipeline.run import RunFolder
from pipeline.store import storage

if TYPE_CHECKING:
    from pipeline.models.clip import PairModel
    from pipeline.replay.train import Pairs

#: Called with the number of the run and what its `progress.json` says.
RunProgress = Callable[[int, dict[str, Any]], None]

#: Seconds between two looks at the runs' progress.
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class ProxyJob:
    """What every training process is sent.

    Attributes:
        config, model_factory, folder, rows, identity: as in `train_proxy`.
        open_pairs: opens the decoded pairs on the machine of the training process.
    """

    config: Config
    model_factory: Callable[[int], PairModel]
    open_pairs: Callable[[], Pairs]
    folder: RunFolder
    rows: Rows | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    def train(self, run: int, **where: Any) -> int:
        """Train one run here; the number of its steps."""
        from pipeline.replay.proxy import train_proxy

        pairs = self.open_pairs()
        record = train_proxy(
            self.config, self.model_factory, pairs, self.folder, run, rows=self.rows, identity=self.identity, **where
        )
        return len(record.rates)


def train_runs(job: ProxyJob, progress: RunProgress | None = None) -> list[int]:
    """Train all `proxy.runs` on the connected Ray cluster, and say how many steps each has; finished ones are read.

    With `proxy.workers: 1` the runs go side by side as resources allow; else one after the other, each through
    `ray.train` with that many workers. A lost worker is replaced `engine.retries` times and goes on from the last
    resume point. Raises what `train_proxy` raises, and `StageError` when workers were lost too often.
    """
    proxy = job.config.proxy
    finished = threading.Event()
    with ThreadPoolExecutor(1) as watcher:
        if progress is not None:
            watcher.submit(_watch, job, progress, finished)
        try:
            if proxy.workers == 1:
                return _train_side_by_side(job)
            return [_gather(_train_distributed, job, [run], num_cpus=0)[0] for run in range(proxy.runs)]
        finally:
            finished.set()


def _gpus(job: ProxyJob) -> float:
    given = job.config.proxy.gpus_per_worker
    return given if given is not None else float(ray.cluster_resources().get("GPU", 0) > 0)  # type: ignore[no-untyped-call]


def _train_side_by_side(job: ProxyJob) -> list[int]:
    return _gather(_train_alone, job, range(job.config.proxy.runs), num_gpus=_gpus(job))


def _gather(function: Callable[[ProxyJob, int], int], job: ProxyJob, runs: Iterable[int], **options: Any) -> list[int]:
    """`function(job, run)` for all `runs` in Ray tasks. Raises `StageError`, and the project's own errors."""
    task = ray.remote(function).options(max_retries=job.config.engine.retries, **options)
    sent = ray.put(job)
    try:
        steps: list[int] = ray.get([task.remote(sent, run) for run in runs])
    except RayTaskError as error:
        if isinstance(error.cause, DiffpruneError | OSError):
            raise error.cause from None
        raise
    except RayError as error:
        raise _lost(error) from None
    return steps


def _lost(error: Exception) -> StageError:
    return StageError(f"the proxy run was lost: {' '.join(str(error).split())[:300]}; start it again to go on")


def _train_alone(job: ProxyJob, run: int) -> int:
    import torch

    return job.train(run, device="cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")


def _train_distributed(job: ProxyJob, run: int) -> int:
    """Run `ray.train`'s own driver, in a task without resources; the training workers are actors beside it."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    files = RecordFolder.of(job.folder, run)
    storage.remove(files.failure)
    gpus = _gpus(job)
    trainer = TorchTrainer(
        _train_shared,
        train_loop_config={"job": job, "run": run},
        scaling_config=ScalingConfig(
            num_workers=job.config.proxy.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=f"run-{run:03d}",
            storage_path=_storage_path(job.folder),
            failure_config=FailureConfig(max_failures=job.config.engine.retries),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _lost(error) from None
    if storage.exists(files.failure):
        raise StageError(storage.read_json(files.failure)["error"])
    return int(storage.read_json(files.progress)["steps"])


def _storage_path(folder: RunFolder) -> str:
    """Where `ray.train` keeps its own notes: all workers must see it."""
    path = storage.join(folder.root, "ray-train")
    return os.path.abspath(storage.local_path(path)) if storage.is_local(path) else path


def _train_shared(parts: dict[str, Any]) -> None:
    """One worker of a distributed run."""
    from ray.train.torch import get_device

    from pipeline.replay.workers import Group

    job: ProxyJob = parts["job"]
    workers = Group()
    try:
        job.train(parts["run"], device=get_device(), workers=workers)
    except DiffpruneError as error:
        # Trying again would end the same way, so this is no failure to Ray: the driver reads the reason and raises it.
        if workers.rank == 0:
            storage.write_json(RecordFolder.of(job.folder, parts["run"]).failure, {"error": str(error)})


def _watch(job: ProxyJob, progress: RunProgress, finished: threading.Event) -> None:
    shown: dict[int, Any] = {}
    while True:
        last = finished.wait(POLL_SECONDS)
        for run in range(job.config.proxy.runs):
            url = RecordFolder.of(job.folder, run).progress
            state = storage.read_json(url) if storage.exists(url) else None
            if state is not None and shown.get(run) != state:
                shown[run] = state
                progress(run, state)
        if last:
            return
