"""Proxy runs on a Ray cluster: one worker per run in plain tasks side by side, several per run through `ray.train`.

The driver loads neither torch nor `ray.train`: functions that run in a task import what they need.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import Config
from pipeline.device import device_of_this_task, gpus_for_a_task
from pipeline.errors import DiffpruneError, StageError
from pipeline.patience import Patience, Silence, kill, killed_by_errors
from pipeline.replay.files import RecordFolder
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.store.pulse import read_pulse

if TYPE_CHECKING:
    from pipeline.models.clip import PairModel
    from pipeline.replay.train import Pairs


class WorkersLostError(StageError):
    """The processes that train died or hung too often."""


#: Called with the number of the run and what its `progress.json` says.
RunProgress = Callable[[int, dict[str, Any]], None]

#: CPUs that crop pairs as fast as one GPU trains on them: at 224 px one crops 1,000 pairs per second.
CROPPING_CPUS = 4

#: Seconds between two looks at the runs' progress.
POLL_SECONDS = 1.0

#: Seconds between two looks of a worker that shares a run with others.
WORKER_POLL_SECONDS = 5.0

#: Seconds that a process which is killed is waited for.
KILLED_WITHIN = 10.0

#: Seconds in which the driver says that workers which share a run are silent, or those that gave up end by themselves.
SAID_WITHIN = 5.0

#: Seconds that workers which share a run wait for each other: each decodes its pairs before the first step, and those
#: that hang are ended by their silence.
MEETING_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class ProxyJob:
    """What every training process is sent.

    Attributes:
        config, model_factory, folder, identity: as in `train_proxy`.
        open_pairs: opens the decoded pairs on the machine of the training process.
    """

    config: Config
    model_factory: Callable[[int], PairModel]
    open_pairs: Callable[[], Pairs]
    folder: RunFolder
    identity: Mapping[str, Any] = field(default_factory=dict)

    def train(self, run: int, **where: Any) -> int:
        """Train one run here; the number of its steps. An error that ends it for good is left in `failed.json`."""
        from pipeline.replay.proxy import train_proxy

        try:
            pairs = self.open_pairs()
            record = train_proxy(
                self.config, self.model_factory, pairs, self.folder, run, identity=self.identity, **where
            )
        except DiffpruneError as error:
            storage.write_json(self.failure(run), {"error": str(error)})
            raise
        return len(record.rates)

    def failure(self, run: int) -> str:
        """The file that says why a run stopped for good."""
        return RecordFolder.of(self.folder, run).failure


def train_runs(
    job: ProxyJob, progress: RunProgress = lambda run, state: None, note: Callable[[str], None] = lambda text: None
) -> list[int]:
    """Train all `proxy.runs` on the connected Ray cluster, and say how many steps each has; finished ones are read.

    With `proxy.workers: 1` the runs go side by side as resources allow; else one after the other, each through
    `ray.train` with that many workers. A lost worker is replaced `engine.retries` times and goes on from the last
    resume point; so are runs of which `engine.task_timeout` saw no step, which `note` is told. Of runs with one worker
    only losses count since one got further than ever before. Raises what `train_proxy` raises, and `StageError` when
    workers were lost or hung too often.
    """
    proxy = job.config.proxy
    for run in range(proxy.runs):
        storage.remove(job.failure(run))
    watch = _Watch(job, progress)
    if proxy.workers == 1:
        gpus = gpus_for_a_task(proxy.gpus_per_worker)
        return _gather(_train_alone, job, range(proxy.runs), watch, note, num_gpus=gpus, num_cpus=_cpus(gpus))
    return [_gather(_train_distributed, job, [run], watch, note, num_cpus=0)[0] for run in range(proxy.runs)]


def _cpus(gpus: float) -> int:
    """CPUs of a process that trains with so many GPUs: enough to crop its pairs, if every node with GPUs has them.

    At most this process's share of half of a node: something else may hold the rest for good, and a task that asks for
    more than there is waits for ever.
    """
    nodes: list[dict[str, Any]] = ray.nodes() if gpus else []  # type: ignore[no-untyped-call]
    offers = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus]
    shares = [int(offer.get("CPU", 0) / 2 * gpus / offer["GPU"]) for offer in offers]
    return max(1, min([CROPPING_CPUS, *shares])) if shares else 1


def _gather(
    function: Callable[[ProxyJob, int], int],
    job: ProxyJob,
    runs: Iterable[int],
    watch: _Watch,
    note: Callable[[str], None],
    **options: Any,
) -> list[int]:
    """`function(job, run)` for all `runs` in Ray tasks. Raises `StageError`, and the project's own errors."""
    # Deaths are counted here, not by Ray, which may start a task again that was killed because it hung.
    task = ray.remote(function).options(max_retries=0, **options)
    sent = ray.put(job)
    in_hand = {task.remote(sent, run): run for run in runs}
    left = dict.fromkeys(in_hand.values(), job.config.engine.retries)
    furthest = dict.fromkeys(left, 0)
    steps: dict[int, int] = {}
    stuck = ""
    watch.silence.begins()
    with killed_by_errors(lambda: in_hand):
        while in_hand:
            done, _ = ray.wait(list(in_hand), timeout=POLL_SECONDS)
            moved = watch.look()
            if not (moved or done) and watch.silence.is_too_long():
                stuck = f"no step of training for {watch.silence.seconds:.0f} s (storage, or a deadlock)"
                note(f"{stuck}: what trains is killed and goes on from the last resume point")
                watch.silence.begins()
                if function is _train_alone:
                    kill(in_hand)
                    done = list(in_hand)
                    ray.wait(done, num_returns=len(done), timeout=KILLED_WITHIN)
            for ref in done:
                run = in_hand.pop(ref)
                watch.silence.begins()
                try:
                    steps[run] = ray.get(ref, timeout=0)
                except RayTaskError as error:
                    if stuck and isinstance(error.cause, WorkersLostError):
                        raise _lost(stuck) from None
                    if isinstance(error.cause, DiffpruneError | OSError):
                        raise error.cause from None
                    raise
                except RayError as error:
                    if (step := watch.step(run)) > furthest[run]:  # its machine was lost, say, which may happen often
                        furthest[run], left[run] = step, job.config.engine.retries
                    if not left[run]:
                        raise _lost(stuck or error) from None
                    left[run] -= 1
                    in_hand[task.remote(sent, run)] = run
    return [steps[run] for run in sorted(steps)]


def _lost(error: Exception | str) -> WorkersLostError:
    return WorkersLostError(f"the proxy run was lost: {' '.join(str(error).split())[:300]}; start it again to go on")


def _train_alone(job: ProxyJob, run: int) -> int:
    return job.train(run, device=device_of_this_task(job.config.proxy.precision))


def _train_distributed(job: ProxyJob, run: int) -> int:
    """Run `ray.train`'s own driver, in a task without resources; the training workers are actors beside it."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = gpus_for_a_task(job.config.proxy.gpus_per_worker)
    trainer = TorchTrainer(
        _train_shared,
        train_loop_config={"job": job, "run": run},
        scaling_config=ScalingConfig(
            num_workers=job.config.proxy.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": _cpus(gpus), **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=MEETING_SECONDS),
        run_config=RunConfig(
            name=f"run-{run:03d}",
            storage_path=_storage_path(job.folder),
            failure_config=FailureConfig(max_failures=job.config.engine.retries),
        ),
    )
    lost: TrainingFailedError | None = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        lost = error
    if storage.exists(job.failure(run)):
        raise StageError(storage.read_json(job.failure(run))["error"])
    if lost is not None:
        raise _lost(lost)
    return int(storage.read_json(RecordFolder.of(job.folder, run).progress)["steps"])


def _storage_path(folder: RunFolder) -> str:
    """Where `ray.train` keeps its own notes: all workers must see it."""
    path = storage.join(folder.root, "ray-train")
    return os.path.abspath(storage.local_path(path)) if storage.is_local(path) else path


def _train_shared(parts: dict[str, Any]) -> None:
    """One worker of a distributed run."""
    from ray.train.torch import get_device

    from pipeline.replay.workers import Group

    job: ProxyJob = parts["job"]
    run: int = parts["run"]
    if storage.exists(job.failure(run)):
        return  # Ray has started all workers anew since one gave up: trying again would end the same way
    ended = threading.Event()
    # Nobody else can end this process alone: what is left of a killed `ray.train` may keep its CPUs for good.
    threading.Thread(target=_end_when_stuck, args=(job, run, ended), daemon=True).start()
    device = get_device()
    # That a worker gives up is no failure to Ray: the driver reads the reason and raises it.
    with suppress(DiffpruneError):
        job.train(run, device=device, workers=Group(device))
    ended.set()


def _end_when_stuck(job: ProxyJob, run: int, ended: threading.Event) -> None:
    """End this process when no worker has taken a step for too long, or when it waits for one that has given up.

    `ray.train` then starts all of them anew.
    """
    watch = _Watch(job, lambda run, state: None)
    while not watch.silence.is_too_long():
        time.sleep(WORKER_POLL_SECONDS)
        watch.look()
        if read_pulse(job.failure(run)) is not None and not ended.wait(SAID_WITHIN):
            break
    time.sleep(SAID_WITHIN)  # the driver looks at the same files: it says so before anything ends
    os._exit(1)


class _Watch:
    """What the files of the runs say of their progress, and how long they have said nothing new."""

    def __init__(self, job: ProxyJob, progress: RunProgress) -> None:
        self.silence = Silence(Patience(job.config.engine.task_timeout))
        self._files = [RecordFolder.of(job.folder, run).progress for run in range(job.config.proxy.runs)]
        self._decoding = job.folder.decoding
        self._progress = progress
        self._shown: dict[str, Any] = {}
        self._has_news()  # what an earlier attempt left is none

    def step(self, run: int) -> int:
        """The last that a run was seen to take."""
        return int(self._shown.get(self._files[run], {}).get("step", 0))

    def look(self) -> bool:
        """Tell of the steps that were taken since; whether there were any, or pairs were decoded."""
        if not self._has_news():
            return False
        self.silence.news()
        return True

    def _has_news(self) -> bool:
        found = self._is_new(self._decoding) is not None
        for run, url in enumerate(self._files):
            if (state := self._is_new(url)) is not None:
                found = True
                self._progress(run, state)
        return found

    def _is_new(self, url: str) -> dict[str, Any] | None:
        state = read_pulse(url)
        if state is None or self._shown.get(url) == state:
            return None
        self._shown[url] = state
        return state
