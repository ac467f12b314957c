"""Scoring over Ray with a fake scorer: every shard committed or set aside, whatever fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.config import EngineConfig
from pipeline.engine import scoring
from pipeline.engine.failures import read_aside
from pipeline.engine.metrics import DriverMetrics
from pipeline.engine.scoring import score_shards
from pipeline.errors import FingerprintError, StageError
from pipeline.run import RunFolder
from pipeline.selection.scan import committed_shards
from pipeline.store import storage
from pipeline.store.commits import open_scores, read_marks
from pipeline.store.fingerprint import Fingerprint
from tests.engine.fakes import FINGERPRINT, FakeSpec, ctrl_c, fake_table, shard_infos

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def config() -> EngineConfig:
    return EngineConfig(workers=2, cpus_per_worker=1, retries=2, retry_wait=0.05)


def scored_by(script: Path) -> Counter[int]:
    return Counter(int(line.split()[0]) for line in (script / "log").read_text().splitlines())


def test_every_shard_is_committed_and_a_second_call_scores_none_again(
    tmp_path: Path, config: EngineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(12)
    spec = FakeSpec(run, script=str(tmp_path))
    outcome = score_shards(spec, shards, run, FINGERPRINT, config)
    assert (outcome.done, outcome.failed) == (12, [])
    assert outcome.statuses == {"ok": 12 * 18, "no-image": 12 * 2}
    table = open_scores(run).to_table()
    assert table.num_rows == 240
    assert table.column("uid").to_pylist()[20:40] == fake_table(shards[1])["uid"].to_pylist()
    assert capsys.readouterr().err.count("score: scored by a slower way\n") == 1, "not once per worker"

    again = score_shards(spec, shards, run, FINGERPRINT, config)
    assert (again.done, again.statuses) == (12, outcome.statuses)
    assert set(scored_by(tmp_path).values()) == {1}


def test_a_shard_that_raises_is_retried_then_set_aside_while_the_others_go_on(
    tmp_path: Path, config: EngineConfig
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(6)
    (tmp_path / "raise-3").touch()
    spec = FakeSpec(run, script=str(tmp_path))
    outcome = score_shards(spec, shards, run, FINGERPRINT, config)
    assert outcome.done == 5
    aside = read_aside(run.failure_file(3))
    assert aside is not None
    assert (aside.failure.exception, aside.failure.message) == ("OSError", "the tar is torn")
    assert (aside.failure.last_sample, aside.attempts, aside.worker_deaths) == ("000007", 3, 0)
    assert aside.failure.node
    with pytest.raises(StageError, match="1 of 6 shards failed"):
        outcome.check(0.0, "failed")
    outcome.check(0.2, "failed")

    (tmp_path / "raise-3").unlink()
    still = score_shards(spec, shards, run, FINGERPRINT, config)
    assert [aside.item for aside in still.failed] == [3]
    retried = score_shards(spec, shards, run, FINGERPRINT, config, retry_failed=True)
    assert (retried.done, retried.failed) == (6, [])
    assert read_aside(run.failure_file(3)) is None


def test_a_shard_that_kills_its_worker_is_set_aside_and_costs_no_other_shard(
    tmp_path: Path, config: EngineConfig
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(10)
    (tmp_path / "kill-4").touch()
    outcome = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, config)
    assert outcome.done == 9
    assert [aside.item for aside in outcome.failed] == [4]
    assert outcome.failed[0].worker_deaths == 2
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({worker for shard, _, worker in lines if shard == "4"}) == 1


def test_a_killed_worker_costs_only_what_it_had_in_hand(tmp_path: Path, config: EngineConfig) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(10)
    (tmp_path / "once-2").touch()
    outcome = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, config)
    assert (outcome.done, outcome.failed) == (10, [])
    repeated = sum(count - 1 for count in scored_by(tmp_path).values())
    assert 1 <= repeated <= config.prefetch + 2


def test_a_worker_whose_gpu_breaks_is_started_anew_and_costs_no_shard(tmp_path: Path, config: EngineConfig) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(20)
    (tmp_path / "cuda-2").touch()
    spec = FakeSpec(run, script=str(tmp_path), seconds=0.1)
    outcome = score_shards(spec, shards, run, FINGERPRINT, config)
    assert (outcome.done, outcome.failed) == (20, [])
    assert len((tmp_path / "started").read_text().split()) == 3


@pytest.mark.parametrize("event", ["hang", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_shard_that_hangs_its_worker_is_set_aside_and_costs_no_other_shard(
    tmp_path: Path,
    config: EngineConfig,
    event: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(8)
    (tmp_path / f"{event}-3").touch()
    monkeypatch.setattr(scoring, "LOOK_EVERY", 0.5)
    # A machine under load stops a worker for seconds; an innocent shard is given up only if that happens to it twice.
    config = config.model_copy(update={"shard_timeout": 4.0, "retries": 2})
    outcome = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, config)
    assert outcome.done == 7
    assert [(aside.item, aside.failure.exception) for aside in outcome.failed] == [(3, "WorkerHung")]
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({worker for shard, _, worker in lines if shard == "3"}) == 1
    for process in {int(process) for shard, process, _ in lines if shard == "3"}:
        assert not alive(process), "the process that hung is still there"
    assert "was silent for" in capsys.readouterr().err


def test_an_outage_of_storage_costs_time_but_no_shard(
    tmp_path: Path, config: EngineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(12)
    spec = FakeSpec(run, script=str(tmp_path))
    config = config.model_copy(update={"workers": 1, "storage_timeout": 2.0, "retries": 1})
    (tmp_path / "away").touch()
    with pytest.raises(
        StageError,
        match=r"score: storage has not answered for \d s: InputError: .*: cannot be read; nothing was given up",
    ):
        score_shards(spec, shards, run, FINGERPRINT, config)
    assert not (tmp_path / "run" / "failed").exists()
    assert [mark.shard for mark in read_marks(run)] == [0, 1, 2, 3]
    for number in range(4):
        Path(run.score_mark(number)).unlink()

    def come_back() -> None:
        while not Path(run.score_mark(0)).exists():
            time.sleep(0.05)
        time.sleep(1)
        (tmp_path / "away").unlink()

    with ThreadPoolExecutor() as pool:
        pool.submit(come_back)
        outcome = score_shards(spec, shards, run, FINGERPRINT, config.model_copy(update={"storage_timeout": 60.0}))
    assert (outcome.done, outcome.failed) == (12, [])
    said = capsys.readouterr().err
    assert "storage does not answer, which is tried again for 1 min: InputError" in said
    assert "storage answers again" in said


def test_the_death_of_a_worker_without_a_shard_is_noticed(
    tmp_path: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(2)
    (tmp_path / "wait-0").touch()
    noticed = threading.Event()
    monkeypatch.setattr(DriverMetrics, "worker_died", lambda self: noticed.set())

    def kill_the_idle_one() -> bool:
        try:
            os.kill(idle_worker(tmp_path), signal.SIGKILL)
            return noticed.wait(60)
        finally:
            (tmp_path / "wait-0").unlink()

    with ThreadPoolExecutor() as pool:
        found = pool.submit(kill_the_idle_one)
        outcome = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, config)
        assert found.result()
    assert (outcome.done, outcome.failed) == (2, [])


def idle_worker(folder: Path) -> int:
    """The process of the worker that does not hold shard 0, a moment after both are ready.

    Shard 1 is behind shard 0 in the other's queue or, where both were ready at once, was this one's and is done.
    """
    for _ in range(600):
        time.sleep(0.1)
        if not (folder / "started").exists() or not (folder / "log").exists():
            continue
        log = [line.split() for line in (folder / "log").read_text().splitlines()]
        busy = {int(process) for shard, process, _ in log if shard == "0"}
        idle = [pid for pid in map(int, (folder / "started").read_text().split()) if pid not in busy]
        if busy and idle:
            time.sleep(2)
            return idle[0]
    raise AssertionError("no idle worker came up")


def alive(process: int) -> bool:
    """Whether a process is there, for up to ten seconds; one that has ended and waits for its parent is not."""
    for _ in range(100):
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.1)
    return True


def test_stale_results_are_refused_by_name_or_redone(tmp_path: Path, config: EngineConfig) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(3)
    config = config.model_copy(update={"workers": 1})
    score_shards(FakeSpec(run), shards, run, FINGERPRINT, config)
    other = Fingerprint({**FINGERPRINT.parts, "score": {"estimator": "other"}})
    spec = FakeSpec(run, fingerprint=other)
    with pytest.raises(FingerprintError, match=r'score.estimator: "fake" there, "other" now'):
        score_shards(spec, shards, run, other, config)
    redo = config.model_copy(update={"stale": "redo"})
    assert score_shards(spec, shards, run, other, redo).done == 3
    assert {mark.fingerprint for mark in read_marks(run)} != {""}
    assert all(mark.parts["score"] == {"estimator": "other"} for mark in read_marks(run))


def test_a_shard_that_fails_with_new_settings_keeps_no_old_scores(tmp_path: Path, config: EngineConfig) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(3)
    score_shards(FakeSpec(run), shards, run, FINGERPRINT, config)
    (tmp_path / "raise-1").touch()
    other = Fingerprint({**FINGERPRINT.parts, "score": {"estimator": "other"}})
    spec = FakeSpec(run, fingerprint=other, script=str(tmp_path))
    redo = config.model_copy(update={"stale": "redo", "retries": 0})
    outcome = score_shards(spec, shards, run, other, redo)
    assert [aside.item for aside in outcome.failed] == [1]
    assert [mark.shard for mark in read_marks(run)] == [0, 2]
    committed_shards(run)
    storage.write_json(run.score_mark(2), {**storage.read_json(run.score_mark(2)), "parts": FINGERPRINT.parts})
    with pytest.raises(
        StageError, match=r"expected scores of one setting, found 2 \(.*00000\.parquet and .*00002\.parquet "
    ):
        committed_shards(run)


def test_workers_that_cannot_start_end_the_run_with_the_reason(tmp_path: Path, config: EngineConfig) -> None:
    run = RunFolder(str(tmp_path / "run"))
    with pytest.raises(StageError, match="no worker can start: ValueError: no such checkpoint"):
        score_shards(FakeSpec(run, broken="no such checkpoint"), shard_infos(3), run, FINGERPRINT, config)


def test_a_worker_that_hangs_or_dies_at_its_start_is_started_anew(
    tmp_path: Path, config: EngineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(4)
    (tmp_path / "start-hang").touch()
    (tmp_path / "start-kill").touch()
    config = config.model_copy(update={"start_timeout": 2.0, "workers": 1})
    outcome = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, config)
    assert (outcome.done, outcome.failed) == (4, [])
    assert set(scored_by(tmp_path).values()) == {1}
    assert list(tmp_path.glob("start-*")) == []
    assert "at its start and is killed" in capsys.readouterr().err


def test_workers_that_hang_at_each_start_end_the_run_with_the_reason(tmp_path: Path, config: EngineConfig) -> None:
    run = RunFolder(str(tmp_path / "run"))
    for number in range(9):
        (tmp_path / f"start-hang-{number}").touch()
    config = config.model_copy(update={"start_timeout": 1.0, "workers": 1, "retries": 1})
    with pytest.raises(StageError, match=r"no worker can start: WorkerHung: the worker hung at its start"):
        score_shards(FakeSpec(run, script=str(tmp_path)), shard_infos(3), run, FINGERPRINT, config)
    assert len(list(tmp_path.glob("start-*"))) in (7, 8), "tried again once, by a process that came as far, or was late"


def test_ctrl_c_finishes_what_is_in_hand_and_the_same_call_goes_on(
    tmp_path: Path, config: EngineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(30)
    spec = FakeSpec(run, script=str(tmp_path), seconds=0.3)
    with (
        ctrl_c(lambda: (tmp_path / "log").exists()),
        pytest.raises(
            StageError, match=r"^score: interrupted, (\d+) of 30 shards left; the same command goes on"
        ) as caught,
    ):
        score_shards(spec, shards, run, FINGERPRINT, config)
    left = int(str(caught.value).split()[2])
    begun = scored_by(tmp_path)
    assert left == 30 - len(begun), "whatever was begun is finished"
    assert 1 <= len(begun) < 30
    assert len(list(read_marks(run))) == len(begun)
    assert "finishing what is in hand (again: stop at once)" in capsys.readouterr().err
    assert score_shards(spec, shards, run, FINGERPRINT, config).done == 30
    assert set(scored_by(tmp_path).values()) == {1}, "nothing is repeated"


@pytest.mark.parametrize("room", [True, False])
def test_while_no_worker_is_ready_a_line_says_why(
    tmp_path: Path,
    config: EngineConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: bool,
) -> None:
    monkeypatch.setattr(scoring, "LOOK_EVERY", 0.2)
    monkeypatch.setattr(scoring, "GONE_AFTER", 1.0)
    said: list[str] = []
    monkeypatch.setattr(scoring.Display, "note", lambda self, text: said.append(text))
    (tmp_path / "start-hang").touch()
    wanted = "; 1 of 1 load what they need, one on " if room else "no room yet for 1 worker with num_cpus=64 each"
    config = config.model_copy(update={"workers": 1, "cpus_per_worker": 1 if room else 64})
    spec = FakeSpec(RunFolder(str(tmp_path / "run")), script=str(tmp_path))
    with ctrl_c(lambda: any(wanted in text for text in said)), pytest.raises(StageError, match="3 of 3 shards left"):
        score_shards(spec, shard_infos(3), RunFolder(str(tmp_path / "run")), FINGERPRINT, config)
    assert (tmp_path / "start-hang").exists() != room


def test_actors_have_names_that_mean_something(tmp_path: Path, config: EngineConfig) -> None:
    run, seen = RunFolder(str(tmp_path / "run")), set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            seen.update(ray.util.list_named_actors())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        score_shards(FakeSpec(run, seconds=0.3), shard_infos(12), run, FINGERPRINT, config)
        ended.set()
    assert {name.rpartition("-")[0] for name in seen} == {"score-worker-0", "score-worker-1"}


def test_a_slow_worker_gets_less(tmp_path: Path, config: EngineConfig) -> None:
    run = RunFolder(str(tmp_path / "run"))
    (tmp_path / "slow-worker-0").touch()
    score_shards(FakeSpec(run, script=str(tmp_path), seconds=0.05), shard_infos(40), run, FINGERPRINT, config)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    by_worker = Counter(worker for _, _, worker in lines)
    assert by_worker["0"] < by_worker["1"]
    assert by_worker.total() == 40
