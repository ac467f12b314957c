"""Independent tasks over Ray: every one run once, resumed, retried or set aside."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import NodeDiedError

from pipeline.config import EngineConfig
from pipeline.engine import progress, tasks
from pipeline.engine.failures import read_aside
from pipeline.engine.shard_queue import ShardQueue
from pipeline.engine.tasks import run_task, run_tasks
from pipeline.errors import ConfigError, StageError
from pipeline.patience import Patience, kill
from pipeline.run import RunFolder
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.task_marks import TaskMarks
from tests.engine.fakes import ctrl_c

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

CONFIG = EngineConfig(retries=2, retry_wait=0.05)


@dataclass(frozen=True)
class Square:
    """Squares a number; files in `folder` say which number raises or kills its process, and how often."""

    folder: str

    def __call__(self, number: int) -> int:
        with open(Path(self.folder, "log"), "a") as log:
            log.write(f"{number}\n")
        for trouble in Path(self.folder).glob(f"{number}-*"):
            trouble.unlink()
            if trouble.name.startswith(f"{number}-kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if trouble.name.startswith(f"{number}-hang"):
                hang(self.folder)
            raise ValueError(f"no square of {number}")
        return number * number


def hang(folder: str) -> None:
    """Never come back; a file in `folder` names this process."""
    Path(folder, f"hung-{os.getpid()}").touch()
    threading.Event().wait()


class OnlyForHung(Patience):
    """Endless patience, but with processes that hang: how long others take to start must not matter."""

    def __init__(self, seconds: float, folder: Path) -> None:
        super().__init__(seconds)
        self._folder = folder

    @property
    def seconds(self) -> float:
        hung = [int(path.name.removeprefix("hung-")) for path in self._folder.glob("hung-*")]
        return super().seconds if any(psutil.pid_exists(process) for process in hung) else math.inf


def calls(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "log").read_text().split())


def test_results_stream_to_the_callback_and_a_second_call_runs_nothing(tmp_path: Path) -> None:
    marks = TaskMarks(str(tmp_path / "marks"), Fingerprint({"items": 5}))
    for _ in range(2):
        results: dict[int, int] = {}
        outcome = run_tasks(
            Square(str(tmp_path)),
            [3, 4, 5, 6, 7],
            run=RunFolder(str(tmp_path / "run")),
            stage="squares",
            config=CONFIG,
            on_result=results.__setitem__,
            marks=marks,
        )
        assert (outcome.done, outcome.failed) == (5, [])
        assert results == {0: 9, 1: 16, 2: 25, 3: 36, 4: 49}
    assert calls(tmp_path) == [3, 4, 5, 6, 7]


def test_a_cluster_that_grows_is_handed_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(ShardQueue):
        def take(self, worker: str, workers: int = 1) -> int | None:
            depths.append(self.depth)
            return super().take(worker, workers)

    depths: list[int] = []
    nodes = [{"CPU": 0.0}]
    monkeypatch.setattr(tasks, "ShardQueue", Seen)
    monkeypatch.setattr(tasks, "alive_nodes", lambda: nodes)
    monkeypatch.setattr(tasks, "LOOK_EVERY", 0.0)
    outcome = run_tasks(
        Square(str(tmp_path)),
        [3, 4, 5],
        run=RunFolder(str(tmp_path / "run")),
        stage="squares",
        config=CONFIG,
        on_result=lambda number, result: nodes.append({"CPU": 8.0}),
    )
    assert outcome.done == 3
    assert (depths[0], depths[-1]) == (2, 32)


def test_trouble_within_the_retries_is_overcome_and_beyond_is_set_aside_until_the_next_call(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    for name in ("1-raise", "2-kill", "3-a", "3-b", "3-c"):
        (tmp_path / name).touch()
    results: dict[int, int] = {}

    def work() -> list[str]:
        outcome = run_tasks(
            Square(str(tmp_path)), [0, 1, 2, 3], run=run, stage="squares", config=CONFIG, on_result=results.__setitem__
        )
        if outcome.failed:
            with pytest.raises(StageError, match="squares: 1 of 4 failed: 3: ValueError: no square of 3"):
                outcome.check("squares")
        return [aside.name for aside in outcome.failed]

    file = str(tmp_path / "run" / "failed" / "squares" / "00003.json")
    assert work() == ["3"]
    assert results == {0: 0, 1: 1, 2: 4}
    aside = read_aside(file)
    assert aside is not None
    assert (aside.attempts, aside.failure.exception) == (3, "ValueError")
    assert aside.failure.node
    assert work() == []
    assert results[3] == 9
    assert read_aside(file) is None


def test_machines_that_go_away_cost_no_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's answer for a task whose machine is gone takes the place of the first three for task 1."""
    times = iter(range(3))
    real = tasks.tell

    def lose(put: Callable[[Any], None], ref: Any, number: int) -> None:
        if number == 1 and next(times, None) is not None:
            put((number, NodeDiedError("the node it was running on is dead")))
        else:
            real(put, ref, number)

    monkeypatch.setattr(tasks, "tell", lose)
    results: dict[int, int] = {}
    config = CONFIG.model_copy(update={"retries": 0})
    done = run_tasks(
        Square(str(tmp_path)),
        [2, 3],
        run=RunFolder(str(tmp_path / "run")),
        stage="squares",
        config=config,
        on_result=results.__setitem__,
    )
    assert (done.done, done.failed, results) == (2, [], {0: 4, 1: 9})


def test_one_task_outlives_its_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    real, lost = ray.get, iter(range(5))

    def get(ref: Any, **options: Any) -> Any:
        if next(lost, None) is not None:
            raise NodeDiedError("the node it was running on is dead")
        return real(ref, **options)

    monkeypatch.setattr(tasks.ray, "get", get)
    config = CONFIG.model_copy(update={"retries": 0})
    assert run_task(abs, -3, stage="check", config=config) == 3
    lost = iter(range(100))
    with pytest.raises(StageError, match="check: lost its machine 21 times: the node it was running on"):
        run_task(abs, -3, stage="check", config=config)


def test_tasks_that_hang_are_killed_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1-hang").touch()
    results: dict[int, int] = {}
    outcome = run_tasks(
        Square(str(tmp_path)),
        [0, 1, 2, 3],
        run=RunFolder(str(tmp_path / "run")),
        stage="squares",
        config=CONFIG,
        on_result=results.__setitem__,
        patience=OnlyForHung(1.0, tmp_path),
    )
    assert (outcome.done, results) == (4, {0: 0, 1: 1, 2: 4, 3: 9})
    assert calls(tmp_path).count(1) == 2
    # On a machine that is busy the others may not have begun yet.
    assert re.search(r"squares: no news for 1 s: killing [1-4] tasks in progress", capsys.readouterr().err)


@dataclass(frozen=True)
class Slow:
    """Renews the item's file in `folder` for some seconds, or, where the item is marked to hang, does nothing."""

    folder: str

    def __call__(self, item: str) -> str:
        hangs = Path(self.folder, f"{item}-hang")
        if hangs.exists():
            hangs.unlink()
            hang(self.folder)
        for step in range(20):
            Path(self.folder, item).write_text(str(step))
            time.sleep(0.5)
        return item


@pytest.mark.slow
def test_tasks_with_a_pulse_may_take_their_time_and_those_without_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "LOOK_EVERY", 0.2)
    monkeypatch.setattr(progress, "LINE_EVERY", 1.0)
    (tmp_path / "b-hang").touch()
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    results: dict[int, str] = {}
    outcome = run_tasks(
        Slow(str(tmp_path)),
        ["a", "b"],
        run=RunFolder(str(tmp_path / "run")),
        stage="slow",
        config=CONFIG,
        on_result=results.__setitem__,
        patience=OnlyForHung(6.0, tmp_path),
        pulse=lambda item: (tmp_path / item).read_text(),
        begun=lambda step: int(step or 0) / 20,
    )
    assert (outcome.done, results) == (2, {0: "a", 1: "b"})
    said = capsys.readouterr().err
    assert said.count("in progress") == 1, "only b, and only once"
    assert re.search(r"slow: 0 of 2 tasks, \d+ s left\n", said), "known before the first task is done"


@dataclass(frozen=True)
class Late:
    """The first task is done at once, the others write a file each after some seconds."""

    folder: str

    def __call__(self, number: int) -> int:
        if number:
            Path(self.folder, f"begun-{number}").touch()
            time.sleep(4)
            Path(self.folder, f"late-{number}").touch()
        return number


def test_an_error_in_the_driver_ends_what_is_in_hand(tmp_path: Path) -> None:
    def refuse(number: int, result: int) -> None:
        while not (tmp_path / "begun-1").exists():
            time.sleep(0.05)
        raise OSError("the disk is full")

    run = RunFolder(str(tmp_path / "run"))
    with pytest.raises(OSError, match="the disk is full"):
        run_tasks(Late(str(tmp_path)), [0, 1], run=run, stage="late", config=CONFIG, on_result=refuse)
    with ctrl_c((tmp_path / "begun-2").exists), pytest.raises(KeyboardInterrupt):
        run_task(Late(str(tmp_path)), 2, stage="late", config=CONFIG)
    time.sleep(5)
    assert not list(tmp_path.glob("late-*"))


def test_only_what_still_runs_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray aborts the driver that cancels a task whose end has just come."""
    cancelled, cancel = [], ray.cancel

    def record(ref: Any, force: bool) -> None:
        cancelled.append(ref)
        cancel(ref, force=force)

    monkeypatch.setattr(ray, "cancel", record)
    task = ray.remote(max_retries=0)(sleep)
    ended, failed, running = task.remote(0), task.remote(-1), task.remote(60)
    ray.wait([ended, failed], num_returns=2)
    kill([ended, failed, running])
    assert cancelled == [running]


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def nap(number: int) -> int:
    time.sleep(0.2)
    return number


def test_ctrl_c_finishes_what_is_in_hand_and_the_same_call_goes_on(tmp_path: Path) -> None:
    results: dict[int, int] = {}

    def work() -> int:
        run, marks = RunFolder(str(tmp_path / "run")), TaskMarks(str(tmp_path / "marks"), Fingerprint({"items": 40}))
        return run_tasks(
            nap,
            range(40),
            run=run,
            stage="naps",
            config=CONFIG,
            on_result=results.__setitem__,
            marks=marks,
            unit="naps",
        ).done

    with (
        ctrl_c(lambda: bool(results)),
        pytest.raises(
            StageError, match=r"^naps: interrupted, (\d+) of 40 naps left; the same command goes on"
        ) as caught,
    ):
        work()
    assert len(results) == 40 - int(str(caught.value).split()[2])
    assert len(results) < 40
    assert work() == 40


@pytest.mark.slow
def test_one_task_that_hangs_is_killed_and_tried_again_as_often_as_the_config_says(tmp_path: Path) -> None:
    (tmp_path / "4-hang").touch()
    square = Square(str(tmp_path))
    assert run_task(square, 4, stage="square", config=CONFIG, patience=Patience(15.0)) == 16
    assert calls(tmp_path) == [4, 4]
    for number in range(9):
        (tmp_path / f"5-hang-{number}").touch()
    with pytest.raises(StageError, match="square: hung: it had not come back after 1 s"):
        run_task(square, 5, stage="square", config=CONFIG, patience=Patience(1.0))


def test_one_task_gives_its_result_or_raises_what_the_function_raised(tmp_path: Path) -> None:
    def one(function: Callable[[int], int], item: int) -> int:
        return run_task(function, item, stage="square", config=CONFIG)

    (tmp_path / "4-kill").touch()
    assert one(Square(str(tmp_path)), 4) == 16  # its process died once
    assert calls(tmp_path) == [4, 4]
    with pytest.raises(ConfigError, match=r"proxy.model: expected a number, found 7") as caught:
        one(_refuse, 7)
    assert caught.value.key == "proxy.model"
    with pytest.raises(FileNotFoundError, match="gone"):
        one(_gone, 7)
    for number in range(CONFIG.retries + 1):
        (tmp_path / f"5-kill-{number}").touch()
    with pytest.raises(StageError, match=r"^square: lost its process"):
        one(Square(str(tmp_path)), 5)


def _refuse(number: int) -> int:
    raise ConfigError("expected a number", key="proxy.model", found=number)


def _gone(number: int) -> int:
    raise FileNotFoundError("gone")


@dataclass(frozen=True)
class Writes:
    """Writes `text` to the file that an item names, then raises if it is told to."""

    text: str
    fails: bool = False

    def __call__(self, file: str) -> str:
        Path(file).write_text(self.text)
        if self.fails:
            raise ValueError("after its file was written")
        return self.text


def test_a_task_that_broke_off_leaves_no_mark_of_other_settings_over_its_files(tmp_path: Path) -> None:
    file = tmp_path / "file"

    def work(function: Writes) -> str:
        run, marks = (
            RunFolder(str(tmp_path / "run")),
            TaskMarks(str(tmp_path / "marks"), Fingerprint({"a": function.text})),
        )
        run_tasks(function, [str(file)], run=run, stage="writes", config=CONFIG, on_result=lambda *_: None, marks=marks)
        return file.read_text()

    assert work(Writes("one")) == "one"
    assert work(Writes("two", fails=True)) == "two"
    assert work(Writes("one")) == "one"
