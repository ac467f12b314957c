"""One driver per run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.engine import lease
from pipeline.engine.lease import alone
from pipeline.errors import StageError
from pipeline.store import storage
from tests.conftest import Bucket

#: Holds the lease on the file of its argument until it is killed.
HOLDER = """
import sys, time
from pipeline.engine import lease

lease.EVERY = 0.2
with lease.alone(sys.argv[1], print):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EVERY", 0.2)


def quiet(text: str) -> None:
    raise AssertionError(text)


def hold(url: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path, s3_bucket: Bucket) -> None:
    for url in (str(tmp_path / "driver.json"), f"{s3_bucket.url}/driver.json"):
        with alone(url, quiet):
            before = storage.read_json(url)
            assert before["process"] == os.getpid()
            time.sleep(0.5)
            assert storage.read_json(url)["time"] > before["time"]
        assert not storage.exists(url)


def test_another_driver_that_works_is_named_and_one_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    url = str(tmp_path / "driver.json")
    process = hold(url)
    try:
        with (
            pytest.raises(StageError, match=rf"driver.json: process {process.pid} on \S+ works on this folder"),
            alone(url, quiet),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    assert storage.exists(url)
    start = time.monotonic()
    with alone(url, quiet):
        pass
    assert time.monotonic() - start < lease.EVERY * lease.MISSED, "a process of this machine need not be watched"
    assert not storage.exists(url)


@pytest.mark.parametrize("change", [{"host": "other"}, {"process": 1}, {"boot": "another boot"}])
def test_a_driver_elsewhere_is_dead_once_it_gave_no_sign_of_life_for_long(
    tmp_path: Path, change: dict[str, object]
) -> None:
    url = str(tmp_path / "driver.json")
    with alone(url, quiet):
        left = storage.read_json(url)
    storage.write_json(url, {**left, "process": os.getppid(), **change})
    start = time.monotonic()
    with alone(url, quiet):
        assert time.monotonic() - start >= lease.EVERY * lease.MISSED


def test_a_process_that_has_the_number_of_one_before_it_need_not_wait(tmp_path: Path) -> None:
    """In a container that was started anew every driver has the same number."""
    url = str(tmp_path / "driver.json")
    with alone(url, quiet):
        left = storage.read_json(url)
    storage.write_json(url, left)
    start = time.monotonic()
    with alone(url, quiet):
        assert time.monotonic() - start < lease.EVERY * lease.MISSED


def test_of_two_that_begin_in_the_same_moment_one_goes_on(tmp_path: Path) -> None:
    url = str(tmp_path / "driver.json")
    said: list[str] = []

    terminated = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        with alone(url, said.append):
            storage.write_json(url, {**storage.read_json(url), "driver": "another", "host": "elsewhere"})
            assert terminated.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(said) == 1
    assert "on elsewhere" in said[0]
    assert storage.read_json(url)["driver"] == "another", "the file is the other's"
