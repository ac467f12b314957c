"""A cheap scorer that follows the engine's protocol: scores are hashes, behaviour is scripted by files in a folder.

In the folder `script` of a `FakeSpec`, a file named `<event>-<shard>` makes something happen:
`raise-N` raises while loading shard N; `kill-N` kills the process while scoring it; `once-N` does so only once;
`cuda-N` breaks, once, the process's GPU while scoring it, so that it fails there and with every further shard;
`wait-N` waits while the file is there; `hang-N` never comes back from scoring it; `stop-N` stops the whole process;
`away` means that storage does not answer for any shard but the first four;
`slow-worker-W` makes worker W take ten times as long;
`full-N` makes the disk full while its file is written. `start-hang*` never comes back from the start of a worker, and
`start-kill*` kills it there, once for each such file. `log` lists the shards scored: number, process, worker;
`started` the processes of workers.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.inventory import ShardInfo
from pipeline.engine import worker as engine_worker
from pipeline.engine.failures import SampleError
from pipeline.errors import InputError, NoteWarning
from pipeline.run import RunFolder
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import score_table

FINGERPRINT = Fingerprint({"score": {"estimator": "fake"}, "checkpoints": ["a", "b"]})


def shard_infos(count: int, samples: int = 20) -> list[ShardInfo]:
    return [
        ShardInfo(index=i, url=f"mem://{i:05d}.tar", name=f"{i:05d}.tar", samples=samples, bytes=100 + i, etag=f"e{i}")
        for i in range(count)
    ]


def fake_table(shard: ShardInfo, spread: float = 1.0) -> pa.Table:
    """Scores that are a function of the shard's number alone; every seventh row is rejected."""
    count = shard.samples
    generator = np.random.default_rng(shard.index)
    score = (spread * generator.normal(size=count)).astype(np.float32)
    ok = np.arange(count) % 7 != 6
    missing = ~ok

    def when_ok(values: np.ndarray) -> pa.Array:
        return pa.array(values, mask=missing)

    return score_table(
        {
            "uid": [f"{shard.index:016x}{i:016x}" for i in range(count)],
            "key": [f"{i:06d}" for i in range(count)],
            "shard": [shard.name] * count,
            "index": np.arange(count, dtype=np.int32),
            "status": np.where(ok, "ok", "no-image").tolist(),
            "error": [""] * count,
            "utility": when_ok(-score),
            "utility_std": [None] * count,
            "score": when_ok(score),
            "terms": [[float(s) / 2, float(s) / 2] if fine else None for s, fine in zip(score, ok, strict=True)],
            "predicted": [False] * count,
            "loss": when_ok(np.abs(score)),
            "similarity": when_ok(np.tanh(score)),
            "width": when_ok(np.full(count, 32, dtype=np.int32)),
            "height": when_ok(np.full(count, 24, dtype=np.int32)),
            "caption_length": [5] * count,
            "source": ["example.org"] * count,
            "content": [f"{i:032x}" for i in range(count)],
            "caption_id": np.arange(count, dtype=np.int64),
        }
    )


def _full_for_this_thread() -> Callable[[int], None]:
    """An `os.fsync` that finds the disk full in this thread: the actor's other threads write other shards."""
    here, real = threading.get_ident(), os.fsync

    def fsync(handle: int) -> None:
        if threading.get_ident() == here:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    return fsync


@dataclass(frozen=True)
class FakeSpec:
    run: RunFolder
    script: str = ""
    seconds: float = 0.0
    fingerprint: Fingerprint = FINGERPRINT
    broken: str = ""

    def build(self, worker: str) -> FakeWork:
        if self.broken:
            raise ValueError(self.broken)
        for trouble in Path(self.script).glob("start-*") if self.script else ():
            trouble.unlink()
            if trouble.name.startswith("start-kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()
        if self.script:
            with open(Path(self.script, "started"), "a") as started:
                started.write(f"{os.getpid()}\n")
        return FakeWork(self, worker)


class FakeWork:
    def __init__(self, spec: FakeSpec, worker: str) -> None:
        self._spec = spec
        self._worker = worker

    def _event(self, name: str, shard: ShardInfo) -> bool:
        return bool(self._spec.script) and Path(self._spec.script, f"{name}-{shard.index}").exists()

    def load(self, shard: ShardInfo) -> pa.Table:
        if self._event("raise", shard):
            raise SampleError("000007") from OSError("the tar is torn")
        if shard.index > 3 and self._spec.script and Path(self._spec.script, "away").exists():
            raise InputError(f"{shard.url}: cannot be read") from ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        return fake_table(shard)

    def score(self, shard: ShardInfo, loaded: pa.Table) -> pa.Table:
        if self._spec.script:
            with open(Path(self._spec.script, "log"), "a") as log:
                log.write(f"{shard.index} {os.getpid()} {self._worker}\n")
        if self._event("kill", shard):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._event("once", shard):
            Path(self._spec.script, f"once-{shard.index}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._event("cuda", shard):
            Path(self._spec.script, f"cuda-{shard.index}").unlink()
            engine_worker.gpu_is_lost = lambda: True
        if engine_worker.gpu_is_lost():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        warnings.warn("scored by a slower way", NoteWarning, stacklevel=1)
        while self._event("wait", shard):
            time.sleep(0.05)
        if self._event("hang", shard):
            threading.Event().wait()
        if self._event("stop", shard):
            os.kill(os.getpid(), signal.SIGSTOP)
        slow = bool(self._spec.script) and Path(self._spec.script, f"slow-worker-{self._worker}").exists()
        time.sleep(self._spec.seconds * (10 if slow else 1))
        return loaded

    def commit(self, shard: ShardInfo, scored: Any, seconds: dict[str, float]) -> dict[str, int]:
        if self._event("full", shard):
            with unittest.mock.patch("os.fsync", _full_for_this_thread()):
                return self._write(shard, scored, seconds)
        return self._write(shard, scored, seconds)

    def _write(self, shard: ShardInfo, scored: Any, seconds: dict[str, float]) -> dict[str, int]:
        mark = commit_scores(
            self._spec.run,
            shard,
            scored,
            self._spec.fingerprint,
            estimator="fake",
            seconds=seconds,
            finished=time.time(),
            worker=self._worker,
        )
        return mark.statuses


@contextmanager
def ctrl_c(when: Callable[[], bool]) -> Iterator[None]:
    """SIGINT to this process, once `when` is true, and as at a terminal: a job in the background would ignore it."""
    ended = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        while not ended.wait(0.05):
            if when():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
