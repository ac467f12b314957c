"""Proxy runs on Ray: the files of a run that never met Ray, side by side or shared, and its errors as they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.errors import StageError
from pipeline.models.clip import PairModel
from pipeline.models.manifest import Manifest
from pipeline.replay.proxy import train_proxy
from pipeline.replay.ray_train import ProxyJob, train_runs
from pipeline.replay.record import Record
from pipeline.run import RunFolder
from tests.replay.pairs import Factory, MemoryPairs, config_of

pytestmark = pytest.mark.ray


class Troubled:
    """Pairs with which something happens when the eighth batch is asked for."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.pairs = MemoryPairs()
        self.ids = self.pairs.ids
        self.batches = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, rows: Any) -> Any:
        self.batches += 1
        if self.batches == 8:
            self.trouble()
        return self.pairs.batch(rows)

    def trouble(self) -> None:
        raise NotImplementedError


class DyingOnce(Troubled):
    """They end their process once, and leave the file `where`."""

    def trouble(self) -> None:
        if not self.where.exists():
            self.where.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Troubled):
    """They never come, once for each file `hang*` in the folder `where`."""

    def trouble(self) -> None:
        for file in self.where.glob("hang*"):
            file.unlink()
            threading.Event().wait()


def hasty(config: Config, retries: int = 3, seconds: float = 15.0) -> Config:
    """The config with a limit that the start of a process on a busy machine stays below."""
    engine = config.engine.model_copy(update={"task_timeout": seconds, "retries": retries})
    return config.model_copy(update={"engine": engine})


def job(folder: Path, config: Config, factory: Factory, open_pairs: Any = MemoryPairs) -> ProxyJob:
    return ProxyJob(config, factory, open_pairs, RunFolder(str(folder)))


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("checkpoints/**/*.safetensors"))}


def test_runs_side_by_side_leave_the_files_of_direct_runs(tmp_path: Path, ray_local: None) -> None:
    factory, config = Factory(tmp_path), config_of(runs=2, gpus_per_worker=0)
    seen: list[tuple[int, int]] = []
    trace = tmp_path / "died"
    steps = train_runs(
        job(tmp_path / "ray", config, factory, lambda: DyingOnce(trace)),
        progress=lambda run, state: seen.append((run, state["step"])),
    )
    assert trace.exists()
    assert {(0, 12), (1, 12)} <= set(seen)
    for run in range(2):
        train_proxy(config, factory, MemoryPairs(), RunFolder(str(tmp_path / "direct")), run)
    assert checkpoints(tmp_path / "ray") == checkpoints(tmp_path / "direct")
    assert steps == [12, 12]
    assert Manifest.read(str(tmp_path / "ray" / "checkpoints" / "manifest.json")).runs == [0, 1]


class Meeting:
    """Opens pairs once every one of `runs` tasks has come to open them: tasks one after the other would never meet."""

    def __init__(self, folder: Path, runs: int) -> None:
        self.folder = folder
        self.runs = runs

    def __call__(self) -> MemoryPairs:
        (self.folder / f"here-{os.getpid()}").touch()
        deadline = time.monotonic() + 120
        while len(list(self.folder.glob("here-*"))) < self.runs:
            if time.monotonic() > deadline:
                raise StageError("the other run did not start beside this one")
            time.sleep(0.05)
        return MemoryPairs()


def test_runs_train_at_the_same_time(tmp_path: Path, ray_local: None) -> None:
    meeting = Meeting(tmp_path, runs=2)
    steps = train_runs(job(tmp_path / "ray", config_of(runs=2, gpus_per_worker=0), Factory(tmp_path), meeting))
    assert steps == [12, 12]


def test_a_run_that_hangs_is_killed_and_goes_on_from_its_resume_point(tmp_path: Path, ray_local: None) -> None:
    factory, config = Factory(tmp_path), hasty(config_of(gpus_per_worker=0))
    (tmp_path / "hang").touch()
    notes: list[str] = []
    steps = train_runs(job(tmp_path / "ray", config, factory, lambda: Hanging(tmp_path)), note=notes.append)
    assert steps == [12]
    assert not (tmp_path / "hang").exists()
    assert notes
    assert "goes on from the last resume point" in notes[0]
    train_proxy(config, factory, MemoryPairs(), RunFolder(str(tmp_path / "direct")))
    assert checkpoints(tmp_path / "ray") == checkpoints(tmp_path / "direct")


@pytest.mark.slow
def test_a_run_that_hangs_each_time_ends_with_the_reason(tmp_path: Path, ray_local: None) -> None:
    config = hasty(config_of(gpus_per_worker=0, resume_every=100), retries=0)
    (tmp_path / "hang").touch()
    with pytest.raises(StageError, match=r"^the proxy run was lost: no step of training for \d+ s"):
        train_runs(job(tmp_path / "ray", config, Factory(tmp_path), lambda: Hanging(tmp_path)))


@pytest.mark.slow
def test_workers_that_share_a_run_and_hang_are_killed_and_go_on(tmp_path: Path, ray_local: None) -> None:
    factory, config = Factory(tmp_path), hasty(config_of(workers=2, gpus_per_worker=0, steps=9), seconds=60.0)
    (tmp_path / "hang").touch()
    notes: list[str] = []
    shared = job(tmp_path / "ray", config, factory, lambda: Hanging(tmp_path))
    assert train_runs(shared, note=notes.append) == [9]
    assert not (tmp_path / "hang").exists()
    assert notes
    single = train_proxy(config, factory, MemoryPairs(), RunFolder(str(tmp_path / "direct")))
    assert Record.read(RunFolder(str(tmp_path / "ray"))).losses == pytest.approx(single.losses, rel=1e-4)


def test_divergence_in_a_task_is_the_stages_own_error(tmp_path: Path, ray_local: None) -> None:
    config = config_of(lr=1e30, optimizer="sgd", warmup=0, gpus_per_worker=0)
    with pytest.raises(StageError, match="diverged") as caught:
        train_runs(job(tmp_path, config, Factory(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_workers_that_share_a_run_equal_one_and_survive_a_death(tmp_path: Path, ray_local: None) -> None:
    factory, config = Factory(tmp_path), config_of(workers=2, gpus_per_worker=0, steps=9)
    trace = tmp_path / "died"
    assert train_runs(job(tmp_path / "ray", config, factory, lambda: DyingOnce(trace))) == [9]
    record = Record.read(RunFolder(str(tmp_path / "ray")))
    assert trace.exists()
    single = train_proxy(config, factory, MemoryPairs(), RunFolder(str(tmp_path / "direct")))
    assert record.losses == pytest.approx(single.losses, rel=1e-4)
    model: PairModel = factory(0)
    for ours, theirs in zip(record.checkpoints, single.checkpoints, strict=True):
        left, right = ours.load(model), theirs.load(model)
        assert (left.step, left.lr) == (right.step, right.lr)
        torch.testing.assert_close(left.params["visual.proj"], right.params["visual.proj"], rtol=1e-2, atol=1e-5)


@pytest.mark.slow
def test_divergence_of_shared_workers_is_not_tried_again(tmp_path: Path, ray_local: None) -> None:
    config = config_of(workers=2, lr=1e30, optimizer="sgd", warmup=0, gpus_per_worker=0)
    with pytest.raises(StageError, match="diverged"):
        train_runs(job(tmp_path, config, Factory(tmp_path)))
