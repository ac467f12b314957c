"""Every stage on a disk that is full or read-only: one clear line, and a restart takes nothing torn for whole.

The disk is a real one: a small tmpfs, which only root may mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import invoke
from pipeline.config import dump_config
from pipeline.emit.verify import verify
from tests.faults.outputs import contents, differences
from tests.helpers import write_shards
from tests.integration.runs import small_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

STAGES = ("inventory", "train", "directions", "score", "select", "emit")
DISK_BYTES = 256 << 20


@dataclass
class Disk:
    """A mounted tmpfs with the run folder on it, and what the run folder holds after each stage."""

    path: Path
    config: Path
    after: dict[str, Path]

    @property
    def run(self) -> Path:
        return self.path / "run"

    def lay_out(self, stage: str) -> None:
        """The run folder as it is before `stage`."""
        for old in self.path.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        before = STAGES.index(stage)
        if before:
            shutil.copytree(self.after[STAGES[before - 1]], self.run)

    def leave(self, free: int) -> None:
        """Fill the disk until that many bytes are free."""
        room = os.statvfs(self.path)
        os.posix_fallocate(
            handle := os.open(self.path / "filler", os.O_CREAT | os.O_WRONLY), 0, room.f_bavail * room.f_bsize - free
        )
        os.close(handle)

    def make_room(self) -> None:
        (self.path / "filler").unlink()

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)

    def written_by(self, stage: str) -> int:
        """Bytes that `stage` adds to the run folder, in whole pages as a tmpfs counts them."""
        before = STAGES.index(stage)
        return _pages(self.after[stage]) - (_pages(self.after[STAGES[before - 1]]) if before else 0)


def _pages(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("full")
    path, config = folder / "disk", folder / "job.yaml"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        made = Disk(path, config, {stage: folder / f"after-{stage}" for stage in STAGES})
        shards = write_shards(folder / "in", shards=6, samples=12)
        settings = small_config(shards, made.run, proxy={"resume_every": 2}, engine={"retries": 1, "retry_wait": 0.01})
        config.write_text(dump_config(settings))
        for stage in STAGES:
            assert invoke([stage, str(config)]) == 0
            shutil.copytree(made.run, made.after[stage])
        yield made
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The line that begins with `error:`; there must be one, and nothing after it."""
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error:"), lines
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_full_disk_says_so_and_is_made_good_by_the_same_command(
    disk: Disk, stage: str, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.lay_out(stage)
    disk.leave(int(share * disk.written_by(stage)))
    assert invoke([stage, str(disk.config)]) == 1
    error = error_of(capsys)
    assert "No space left on device" in error
    assert len(error) < 500, error
    disk.make_room()
    assert invoke([stage, str(disk.config), *(["--retry-failed"] if stage == "score" else [])]) == 0
    assert differences(contents(disk.after[stage]), contents(disk.run)) == []
    assert verify(str(disk.run)) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_read_only_disk_says_so_and_changes_nothing(
    disk: Disk, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.lay_out(stage)
    before = contents(disk.run)
    disk.remount("ro")
    try:
        assert invoke([stage, str(disk.config)]) == 1
    finally:
        disk.remount("rw")
    error = error_of(capsys)
    assert "Read-only file system" in error
    assert len(error) < 500, error
    assert contents(disk.run) == before
