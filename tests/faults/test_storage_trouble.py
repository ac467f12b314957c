"""A full disk, a folder that cannot be written to, two writers at once: a clear error or the same bytes."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import EngineConfig
from pipeline.data.inventory import ShardInfo
from pipeline.engine.failures import Aside, Failure, check_writable, read_aside, set_aside
from pipeline.engine.scoring import score_shards
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.store.commits import commit_scores, committed, open_scores, read_marks
from tests.conftest import Bucket
from tests.engine.fakes import FINGERPRINT, FakeSpec, FakeWork, fake_table, shard_infos

CONFIG = EngineConfig(workers=1, cpus_per_worker=1, retries=1, retry_wait=0.05)


def commit(run: RunFolder, number: int, samples: int = 20) -> None:
    shard = shard_infos(number + 1, samples)[number]
    commit_scores(run, shard, fake_table(shard), FINGERPRINT, estimator="fake", seconds={}, finished=0.0)


def commit_all(run: RunFolder, shards: list[ShardInfo]) -> None:
    for shard in shards:
        commit(run, shard.index, shard.samples)


@pytest.fixture(params=["tmpfs", "simulated"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is full after a few score files: a real one where mounting is allowed, and a simulated one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small tmpfs needs root; the simulated disk is tested")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    real = os.fsync

    def fsync(handle: int) -> None:
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if used > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    yield folder


def test_a_full_disk_leaves_whole_files_or_none(small_disk: Path) -> None:
    run, shards = RunFolder(str(small_disk)), shard_infos(200, samples=200)
    with pytest.raises(OSError, match="No space left"):
        commit_all(run, shards)
    done = list(committed(run, shards, FINGERPRINT, "refuse"))
    assert 1 <= len(done) < 200
    for mark in done:
        assert storage.file_checksum(run.score_file(mark.shard)) == mark.checksum
    assert open_scores(run).count_rows() == 200 * len(done)
    assert not list(small_disk.rglob(".tmp-*"))


def test_a_run_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StageError, match="expected a folder that can be written to") as caught:
        check_writable(str(tmp_path / "file" / "run"))
    assert "\n" not in str(caught.value)


def test_a_read_only_disk_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(url: str, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(storage, "write_bytes", read_only)
    run = RunFolder(str(tmp_path))
    with pytest.raises(StageError, match="Read-only file system"):
        score_shards(FakeSpec(run), shard_infos(2), run, FINGERPRINT, CONFIG)
    with pytest.raises(StageError, match=r"cannot be written: .*Read-only.*00001\.tar: OSError: torn is lost"):
        set_aside(run.failure_file(1), Aside(1, "00001.tar", Failure("OSError", "torn"), 1))


def test_two_writers_at_once_never_show_a_reader_anything_but_whole_files(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    commit(run, 0)
    expected = Path(run.score_file(0)).read_bytes()
    writers = [threading.Thread(target=lambda: [commit(run, 0) for _ in range(30)]) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert Path(run.score_file(0)).read_bytes() == expected
        assert [mark.rows for mark in read_marks(run)] == [20]
    assert Path(run.score_file(0)).read_bytes() == expected


def test_a_run_folder_on_an_object_store_works_like_a_local_one(tmp_path: Path, s3_bucket: Bucket) -> None:
    remote, local = RunFolder(f"{s3_bucket.url}/run"), RunFolder(str(tmp_path))
    check_writable(remote.root)
    shards = shard_infos(3)
    for run in (remote, local):
        work = FakeWork(FakeSpec(run), "0")
        for shard in shards:
            work.commit(shard, work.score(shard, work.load(shard)), {"score": 1.0})
    for shard in shards:
        assert storage.read_bytes(remote.score_file(shard.index)) == Path(local.score_file(shard.index)).read_bytes()
    assert [mark.shard for mark in committed(remote, shards, FINGERPRINT, "refuse")] == [0, 1, 2]
    assert open_scores(remote).to_table().equals(open_scores(local).to_table())
    assert [storage.basename(url) for url in storage.list_files(remote.scores)] == [
        f"{number:05d}.{kind}" for number in range(3) for kind in ("json", "parquet")
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_actors_write_to_an_object_store_and_the_run_resumes_from_it(tmp_path: Path, s3_bucket: Bucket) -> None:
    run, shards = RunFolder(f"{s3_bucket.url}/run"), shard_infos(6)
    (tmp_path / "raise-4").touch()
    outcome = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, CONFIG)
    assert (outcome.done, [aside.item for aside in outcome.failed]) == (5, [4])
    (tmp_path / "raise-4").unlink()
    (tmp_path / "log").unlink()
    again = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, CONFIG, retry_failed=True)
    assert (again.done, again.failed) == (6, [])
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == ["4"]
    with pq.ParquetFile(storage.open_read(run.score_file(4))) as file:
        assert file.read().equals(fake_table(shards[4]))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_disk_that_fills_up_under_an_actor_sets_the_shard_aside_and_can_be_made_good(tmp_path: Path) -> None:
    run, shards = RunFolder(str(tmp_path / "run")), shard_infos(4)
    (tmp_path / "full-2").touch()
    outcome = score_shards(FakeSpec(run, script=str(tmp_path)), shards, run, FINGERPRINT, CONFIG)
    aside = read_aside(run.failure_file(2))
    assert aside is not None
    assert "No space left on device" in aside.failure.message
    assert outcome.done == 3
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    assert not Path(run.score_file(2)).exists()
    (tmp_path / "full-2").unlink()
    assert score_shards(FakeSpec(run), shards, run, FINGERPRINT, CONFIG, retry_failed=True).done == 4
