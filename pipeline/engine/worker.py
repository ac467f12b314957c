"""The actor that scores shards: it loads the next ones while the present one is scored."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import ray
import tenacity

from pipeline.data.inventory import ShardInfo
from pipeline.device import gpu_is_lost
from pipeline.engine.failures import Failure
from pipeline.engine.metrics import WorkerMetrics
from pipeline.engine.notes import keep_notes, take_notes

Loaded = TypeVar("Loaded")
Scored = TypeVar("Scored")


@dataclass(frozen=True)
class ShardStats:
    """What came of a shard: rows by status (`ok` and reasons), and the seconds of each phase.

    `waiting` is how long the device stood idle before this shard could be scored; `notes` are those that the process
    had not told of before.
    """

    statuses: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def pairs(self) -> int:
        """All rows, rejected ones included."""
        return sum(self.statuses.values())


class ShardWork(Protocol[Loaded, Scored]):
    """What an actor does with a shard, in three steps of which only the middle one has the device."""

    def load(self, shard: ShardInfo) -> Loaded:
        """Fetch and decode. Called from several threads at once."""
        ...

    def score(self, shard: ShardInfo, loaded: Loaded) -> Scored:
        """Compute. Called for one shard at a time."""
        ...

    def commit(self, shard: ShardInfo, scored: Scored, seconds: dict[str, float]) -> dict[str, int]:
        """Write the result and its mark; returns rows by status. Called from several threads at once."""
        ...


class WorkerSpec(Protocol):
    """How to make the work of an actor: a small picklable value that names files, not their contents."""

    def build(self, worker: str) -> ShardWork[Any, Any]:
        """Load model, checkpoints and plans; called once in each actor's process."""
        ...


class Place(NamedTuple):
    """Where an actor runs: Ray's id of the node, and its host name."""

    node_id: str
    host: str


class ScoreWorker(Generic[Loaded, Scored]):
    """The actor's class: `prefetch + 2` shards are in threads of it, one each in the phases load, score and commit; one
    more call, `stay`, lasts as long as the process.

    At most `prefetch` loaded shards wait in memory beside the one that is scored.
    """

    def __init__(self, name: str, spec: WorkerSpec, prefetch: int) -> None:
        self._name = name
        self._spec = spec
        self._work: ShardWork[Any, Any] | None = None
        self._building = threading.Lock()
        self._memory = threading.Semaphore(prefetch + 1)
        self._loading = threading.Semaphore(prefetch)
        self._device = threading.Lock()
        self._idle_since = time.perf_counter()
        self._stays = 0
        self._left = False
        self._staying = threading.Condition()
        self._metrics = WorkerMetrics(name)
        keep_notes()

    def __repr__(self) -> str:
        return f"ScoreWorker({self._name})"

    def place(self) -> Place:
        """Where this process is: it answers as soon as it runs, before anything is loaded."""
        return Place(ray.get_runtime_context().get_node_id(), socket.gethostname())

    def start(self) -> Failure | None:
        """Build the work if this process has not yet. Returns why it cannot be built."""
        try:
            self._ready_work()
        except Exception as error:
            return Failure.of(error, self._name)
        return None

    def stay(self) -> None:
        """Return once `leave` is called. The call fails when the process dies, so that the driver hears of it even if
        no shard is in hand: a shard given to it then would wait until the cluster has room to start it again.

        A driver whose connection broke calls again: the call before then returns, as each keeps one of the threads.
        """
        with self._staying:
            self._stays += 1
            mine = self._stays
            self._staying.notify_all()
            self._staying.wait_for(lambda: self._left or self._stays > mine)

    def leave(self) -> None:
        """Let `stay` return: the driver is done."""
        with self._staying:
            self._left = True
            self._staying.notify_all()

    def score_shard(self, shard: ShardInfo) -> ShardStats | Failure:
        """Load, score and commit one shard. An exception comes back as a value: it may not survive pickling.

        One after which CUDA does not work in this process any more ends it: it would fail every further shard.
        """
        try:
            work = self._ready_work()
            seconds: dict[str, float] = {}
            with self._memory:
                with self._loading, _Timer(seconds, "load"):
                    loaded = work.load(shard)
                with self._device:
                    seconds["waiting"] = time.perf_counter() - self._idle_since
                    try:
                        with _Timer(seconds, "score"):
                            scored = work.score(shard, loaded)
                    finally:
                        self._idle_since = time.perf_counter()
                del loaded
            with _Timer(seconds, "commit"):
                statuses = work.commit(shard, scored, seconds)
        except Exception as error:
            if gpu_is_lost():
                traceback.print_exception(error)  # into the log of this process
                sys.stderr.flush()
                os._exit(1)
            return Failure.of(error, self._name)
        stats = ShardStats(statuses, seconds, take_notes())
        self._metrics.count(stats.statuses, stats.seconds)
        return stats

    def _ready_work(self) -> ShardWork[Any, Any]:
        with self._building:
            if self._work is None:
                # Storage may stumble while a hundred workers read the same checkpoints; nothing else is retried.
                attempt = tenacity.Retrying(
                    retry=tenacity.retry_if_exception_type(OSError),
                    wait=tenacity.wait_random_exponential(max=20),
                    stop=tenacity.stop_after_attempt(4),
                    reraise=True,
                )
                self._work = attempt(self._spec.build, self._name)
                self._idle_since = time.perf_counter()
            return self._work


class _Timer:
    """Adds the seconds of a block to `seconds[phase]`."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._phase] = time.perf_counter() - self._start
