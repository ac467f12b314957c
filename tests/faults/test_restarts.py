"""Killing the driver, Ctrl-C, and chaos: a restart goes on, repeats little, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.config import EngineConfig
from pipeline.run import RunFolder
from pipeline.store import storage
from tests.engine.fakes import FakeSpec, FakeWork, shard_infos
from tests.faults.chaos import KINDS, STAGES, plan_kills
from tests.faults.outputs import contents, differences

ROOT = Path(__file__).resolve().parent.parent.parent
SHARDS = 40


@pytest.fixture
def start(tmp_path: Path, ray_local: None) -> Iterator[object]:
    """Starts the cheap job as a process of its own on the session's Ray."""
    started: list[subprocess.Popen[str]] = []
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.faults.cheap_job", "--out", str(tmp_path / "run")]
        command += ["--script", str(tmp_path), "--shards", str(SHARDS), "--seconds", "0.15"]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=None, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def scored(folder: Path) -> Counter[int]:
    log = folder / "log"
    return Counter(int(line.split()[0]) for line in log.read_text().splitlines()) if log.exists() else Counter()


def wait_for_marks(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(list((folder / "run" / "scores").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.ray
def test_ctrl_c_and_a_killed_driver_cost_at_most_what_was_in_flight(tmp_path: Path, start) -> None:  # type: ignore[no-untyped-def]
    first = start()
    wait_for_marks(tmp_path, 4, first)
    first.send_signal(signal.SIGINT)
    message = first.communicate()[1]
    assert first.returncode == 1
    assert "finishing what is in hand" in message
    assert "the same command goes on from here" in message.splitlines()[-1]
    committed = {int(path.stem) for path in (tmp_path / "run" / "scores").glob("*.json")}
    assert set(scored(tmp_path)) == committed, "a clean stop leaves nothing half done"

    second = start()
    wait_for_marks(tmp_path, len(committed) + 6, second)
    second.kill()
    second.wait()

    third = start()
    assert third.communicate()[1].splitlines()[-1].startswith(f"score: {SHARDS} of {SHARDS} shards")
    assert third.returncode == 0
    counts = scored(tmp_path)
    in_flight = 2 * (EngineConfig().prefetch + 2)
    assert sorted(counts) == list(range(SHARDS))
    assert sum(counts.values()) <= SHARDS + in_flight

    undisturbed = RunFolder(str(tmp_path / "alone"))
    work = FakeWork(FakeSpec(undisturbed), "0")
    for shard in shard_infos(SHARDS):
        work.commit(shard, work.load(shard), {})
    storage.remove_temporary(str(tmp_path / "run" / "scores"))  # as the stage does when all is committed
    one, other = (contents(tmp_path / name / "scores") for name in ("run", "alone"))
    assert differences(one, other) == []
    assert len(one) == 2 * SHARDS


def test_chaos_sees_what_differs(tmp_path: Path) -> None:
    for name, rows in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        (folder / "tensorboard").mkdir(parents=True)
        (folder / "mark.json").write_text(f'{{"rows": {rows}, "seconds": {{"score": {rows}}}}}')
        (folder / "same.json").write_text(f'{{"rows": 1, "finished": {rows}}}')
        (folder / f"only-{name}").write_bytes(b"x")
        (folder / "tensorboard" / f"events-{name}").write_bytes(b"x")
    found = [contents(tmp_path / name) for name in "ab"]
    assert differences(*found) == ["only-a is missing", "only-b is unexpected", "mark.json differs"]


def test_kills_are_spread_over_stages_and_kinds() -> None:
    plan = plan_kills(24, random.Random(0))
    assert Counter(plan) == Counter({(stage, kind): 2 for stage in STAGES for kind in KINDS})
    assert plan != plan_kills(24, random.Random(1))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1400)
def test_random_kills_of_a_run_change_no_byte(tmp_path: Path) -> None:
    # A process of its own: it chooses Ray's temporary folder, and the session's Ray must not be among its victims.
    command = [sys.executable, "-m", "tests.faults.chaos", "--kills", "16", "--folder", str(tmp_path / "chaos")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["kills"] == 16
    assert sum(1 for kinds in report["by_stage"].values() if kinds) >= len(STAGES)
