"""Proxy runs on Ray: the files of a run that never met Ray, side by side or shared, and its errors as they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import WorkerCrashedError

from pipeline.config import Config
from pipeline.errors import StageError
from pipeline.models.clip import PairModel
from pipeline.models.manifest import Manifest
from pipeline.replay import ray_train
from pipeline.replay.files import RecordFolder
from pipeline.replay.proxy import train_proxy
from pipeline.replay.ray_train import ProxyJob, _cpus, _train_distributed, train_runs
from pipeline.replay.record import Record
from pipeline.run import RunFolder
from pipeline.store import storage
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


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [
        ([(16, 0)], 0, 1),
        ([(16, 1)], 1, 4),
        ([(96, 8)], 1, 4),
        ([(4, 1), (64, 0)], 1, 2),
        ([(96, 8), (8, 2)], 1, 2),
        ([(96, 8), (2, 1)], 2, 4),
        ([(2, 1)], 1, 1),
        ([(16, 1)], 0.25, 2),
        ([], 1, 1),
    ],
)
def test_training_on_a_gpu_asks_for_the_cpus_that_every_node_has(
    monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[int, int]], gpus: float, expected: int
) -> None:
    found = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": has} if has else {"CPU": cpus}} for cpus, has in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 1, "GPU": 8}}
    monkeypatch.setattr(ray, "nodes", lambda: [*found, dead])
    assert _cpus(gpus) == expected


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


class Broken:
    """The process that opens them first trains without end on them; the other one finds them broken."""

    def __init__(self, folder: Path) -> None:
        self.process = folder / "process"

    def __call__(self) -> MemoryPairs:
        try:
            with self.process.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            raise StageError("the pairs are broken") from None
        return MemoryPairs()


def ends(process: int) -> bool:
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not psutil.pid_exists(process)


class Losing:
    """In place of Ray: processes of a run that are lost after its steps `lost`, one after the other."""

    def __init__(self, progress: str, lost: list[int]) -> None:
        self.progress = progress
        self.lost = lost
        self.started = 0

    def remote(self, *_: Any) -> Any:
        self.started += 1
        return self

    def put(self, job: ProxyJob) -> ProxyJob:
        return job

    def options(self, **_: Any) -> Any:
        return self

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        storage.write_json(self.progress, {"step": (self.lost or [12])[0], "steps": 12})
        return refs, []

    def get(self, ref: Any, **_: Any) -> int:
        if self.lost:
            self.lost.pop(0)
            raise WorkerCrashedError
        return 12


@pytest.mark.parametrize(
    ("lost", "trained"), [([4, 9, 11], True), ([4, 4, 9], False), ([4, 9, 9], False), ([4, 9, 5], False)]
)
def test_a_run_may_lose_any_number_of_processes_that_got_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int], trained: bool
) -> None:
    sent = job(tmp_path, hasty(config_of(gpus_per_worker=0), retries=1), Factory(tmp_path))
    monkeypatch.setattr(ray_train, "ray", Losing(RecordFolder.of(sent.folder, 0).progress, lost))
    with nullcontext() if trained else pytest.raises(StageError, match="the proxy run was lost"):
        assert train_runs(sent) == [12]


def test_an_error_of_one_run_ends_the_others(tmp_path: Path, ray_local: None) -> None:
    config = config_of(runs=2, gpus_per_worker=0, steps=10**6)
    broken = Broken(tmp_path)
    with pytest.raises(StageError, match="the pairs are broken"):
        train_runs(job(tmp_path / "ray", config, Factory(tmp_path), broken))
    assert ends(int(broken.process.read_text()))


def test_divergence_in_a_task_is_the_stages_own_error(tmp_path: Path, ray_local: None) -> None:
    config = config_of(lr=1e30, optimizer="sgd", warmup=0, gpus_per_worker=0)
    with pytest.raises(StageError, match="diverged") as caught:
        train_runs(job(tmp_path, config, Factory(tmp_path)))
    assert "\n" not in str(caught.value)
    assert storage.read_json(job(tmp_path, config, Factory(tmp_path)).failure(0)) == {"error": str(caught.value)}


def test_the_reason_of_an_earlier_failure_goes_when_runs_are_trained_again(tmp_path: Path, ray_local: None) -> None:
    again = job(tmp_path, config_of(gpus_per_worker=0), Factory(tmp_path))
    storage.write_json(again.failure(0), {"error": "an earlier one"})
    train_runs(again)
    assert not storage.exists(again.failure(0))


def test_pairs_that_cannot_be_opened_leave_the_reason(tmp_path: Path) -> None:
    def broken() -> MemoryPairs:
        raise StageError("the pairs are broken")

    failing = job(tmp_path, config_of(), Factory(tmp_path), broken)
    with pytest.raises(StageError):
        failing.train(0)
    assert storage.read_json(failing.failure(0)) == {"error": "the pairs are broken"}


class GivingUp(Troubled):
    """The second worker, alone, finds out that they are broken."""

    def trouble(self) -> None:
        if torch.distributed.get_rank() == 1:
            raise StageError("a pair is broken")


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 3])
def test_a_worker_that_gives_up_ends_the_run_with_its_reason(tmp_path: Path, ray_local: None, retries: int) -> None:
    """And not the first worker's silence, which waits for it."""
    config = hasty(config_of(workers=2, gpus_per_worker=0), retries=retries, seconds=300.0)
    with pytest.raises(StageError, match=r"^a pair is broken$"):
        train_runs(job(tmp_path, config, Factory(tmp_path), lambda: GivingUp(tmp_path)))


def test_workers_wait_for_each_other_for_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the half hour that Ray would set: one machine may decode its pairs longer than the other."""
    from ray.train import torch as ray_torch

    seen: list[Any] = []

    class Fake:
        def __init__(self, *args: Any, torch_config: Any, **options: Any) -> None:
            seen.append(torch_config)

        def fit(self) -> None:
            """Nothing to train."""

    shared = job(tmp_path, config_of(workers=2, gpus_per_worker=0), Factory(tmp_path))
    storage.write_json(RecordFolder.of(shared.folder, 0).progress, {"steps": 12})
    monkeypatch.setattr(ray_torch, "TorchTrainer", Fake)
    assert _train_distributed(shared, 0) == 12
    assert seen[0].timeout_s >= 24 * 3600


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
