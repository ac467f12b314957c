"""The actor's class in this process: one shard is scored while the next is loaded, and memory is bounded."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.inventory import ShardInfo
from pipeline.engine import worker
from pipeline.engine.failures import Failure, SampleError
from pipeline.engine.worker import Place, ScoreWorker, ShardStats
from tests.engine.fakes import shard_infos


class Watched:
    """Work that remembers how many shards were in each phase at once, and what overlapped."""

    def __init__(self, *, broken: str = "", storage_errors: int = 0) -> None:
        self.broken = broken
        self.storage_errors = storage_errors
        self.built = 0
        self.now = {"load": 0, "score": 0, "loaded": 0}
        self.most = dict(self.now)
        self.loading_while_scoring = False
        self._lock = threading.Lock()

    def build(self, worker: str) -> Watched:
        self.built += 1
        if self.built <= self.storage_errors:
            raise OSError("storage stumbles")
        if self.broken == "build":
            raise ValueError("no such checkpoint")
        return self

    def _count(self, name: str, change: int) -> None:
        with self._lock:
            self.now[name] += change
            self.most[name] = max(self.most[name], self.now[name])
            self.loading_while_scoring |= bool(self.now["load"] and self.now["score"])

    def load(self, shard: ShardInfo) -> int:
        self._count("load", 1)
        time.sleep(0.02)
        if self.broken == "load" and shard.index == 1:
            self._count("load", -1)
            raise SampleError("000007") from OSError("the tar is torn")
        self._count("load", -1)
        self._count("loaded", 1)
        return shard.index

    def score(self, shard: ShardInfo, loaded: int) -> int:
        assert loaded == shard.index
        self._count("score", 1)
        time.sleep(0.02)
        self._count("score", -1)
        self._count("loaded", -1)
        return loaded

    def commit(self, shard: ShardInfo, scored: int, seconds: dict[str, float]) -> dict[str, int]:
        assert {"load", "waiting", "score"} <= seconds.keys()
        return {"ok": 9, "no-image": 1}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What the actors count, in place of Ray's metrics."""
    found: list[dict[str, int]] = []
    metrics = SimpleNamespace(count=lambda statuses, seconds: found.append(statuses))
    monkeypatch.setattr(worker, "WorkerMetrics", lambda name: metrics)
    context = SimpleNamespace(get_node_id=lambda: "n0")
    monkeypatch.setattr(worker.ray, "get_runtime_context", lambda: context)
    return found


def score_all(spec: Watched, count: int, prefetch: int) -> list[Any]:
    actor: ScoreWorker[int, int] = ScoreWorker("3", spec, prefetch)
    with ThreadPoolExecutor(prefetch + 2) as pool:  # as Ray's `max_concurrency`
        return list(pool.map(actor.score_shard, shard_infos(count)))


@pytest.mark.parametrize("prefetch", [1, 2])
def test_the_next_shards_are_loaded_while_one_is_scored_and_no_more_than_asked_for(
    counted: list[dict[str, int]], prefetch: int
) -> None:
    spec = Watched()
    results = score_all(spec, 12, prefetch)
    assert all(isinstance(result, ShardStats) and result.pairs == 10 for result in results)
    assert counted == [{"ok": 9, "no-image": 1}] * 12
    assert spec.loading_while_scoring
    assert spec.most["score"] == 1
    assert spec.most["load"] <= prefetch
    assert spec.most["loaded"] <= prefetch + 1
    assert spec.built == 1


def test_an_error_comes_back_as_a_value_and_the_next_shard_goes_on(counted: list[dict[str, int]]) -> None:
    results = score_all(Watched(broken="load"), 4, 1)
    assert [type(result) for result in results] == [ShardStats, Failure, ShardStats, ShardStats]
    failure = results[1]
    assert (failure.exception, failure.message, failure.last_sample) == ("OSError", "the tar is torn", "000007")
    assert failure.worker == "3"
    assert failure.node
    assert len(counted) == 3


def test_an_error_that_leaves_no_working_gpu_ends_the_process(
    counted: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class EndedError(BaseException):
        pass

    def end(status: int) -> None:
        raise EndedError(status)

    monkeypatch.setattr(worker.os, "_exit", end)
    monkeypatch.setattr(worker, "gpu_is_lost", lambda: True)
    with pytest.raises(EndedError, match="1"):
        score_all(Watched(broken="load"), 4, 1)
    assert "the tar is torn" in capsys.readouterr().err


def test_a_worker_says_where_it_is_before_it_loads_and_why_it_cannot_start(counted: list[dict[str, int]]) -> None:
    spec = Watched()
    place = ScoreWorker("0", spec, 1).place()
    assert isinstance(place, Place)
    assert (place.node_id, spec.built) == ("n0", 0)
    assert ScoreWorker("0", spec, 1).start() is None
    assert spec.built == 1
    failure = ScoreWorker("0", Watched(broken="build"), 1).start()
    assert isinstance(failure, Failure)
    assert failure.message == "no such checkpoint"
    assert "ScoreWorker(0)" in repr(ScoreWorker("0", Watched(), 1))


def test_storage_that_stumbles_at_the_start_is_asked_again(
    counted: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.tenacity, "wait_random_exponential", lambda max: worker.tenacity.wait_none())
    spec = Watched(storage_errors=2)
    assert ScoreWorker("0", spec, 1).start() is None
    assert spec.built == 3
    lasting = ScoreWorker("0", Watched(storage_errors=9), 1).start()
    assert isinstance(lasting, Failure)
    assert lasting.exception == "OSError"


def test_a_driver_that_lost_its_connection_takes_no_more_threads(counted: list[dict[str, int]]) -> None:
    actor = ScoreWorker("w", Watched(), 1)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(actor.stay), pool.submit(actor.stay)
        third = pool.submit(actor.stay)
        for stay in (first, second):
            assert stay.result(timeout=20) is None
        assert not third.done()
        actor.leave()
        assert third.result(timeout=20) is None
