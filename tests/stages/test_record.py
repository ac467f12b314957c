"""What `config.yaml` records, and when it is replaced."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import parse_config
from pipeline.report.recorded import data_config
from pipeline.stages import record
from pipeline.stages.job import Job
from pipeline.stages.record import begin_record, git_revision, record_config, say_other_versions
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint


def job_of(root: Path, caption: str = "txt") -> Job:
    return Job(parse_config({"out": str(root), "data": {"shards": "a.tar", "caption": caption}}))


def recorded(job: Job) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(storage.read_bytes(job.folder.config))
    return tree


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose stages were run one by one up to the scores."""
    monkeypatch.setattr(record, "known_fingerprint", lambda job: Fingerprint({"caption": job.config.data.caption}))
    job = job_of(tmp_path / "run", "json:text")
    begin_record(job)
    folder = job.folder
    made = {"inventory": folder.inventory, "train": folder.checkpoint_manifest, "directions": folder.directions_mark}
    for stage, url in {**made, "score": folder.score_mark(0)}.items():
        storage.write_json(url, {})
        record_config(job, stage)
        assert (recorded(job)["fingerprint"] is None) == (stage in ("inventory", "train"))
    return job


def test_stages_up_to_the_scores_record_where_captions_are(finished: Job) -> None:
    assert data_config(finished.folder).caption == "json:text"
    assert recorded(finished)["fingerprint"] == Fingerprint({"caption": "json:text"}).digest


@pytest.mark.parametrize("stage", ["inventory", "train", "directions", "select", "emit", "report", "validate"])
def test_the_record_of_scores_stands_until_they_are_made_anew(finished: Job, stage: str) -> None:
    other = job_of(Path(finished.folder.root), "json:other")
    begin_record(other)
    record_config(other, stage)
    assert data_config(finished.folder).caption == "json:text"
    record_config(other, "score")
    assert data_config(finished.folder).caption == "json:other"


def test_before_the_next_stage_has_begun_another_config_is_recorded(tmp_path: Path) -> None:
    job, other = job_of(tmp_path), job_of(tmp_path, "json:other")
    record_config(job, "inventory")
    record_config(other, "inventory")
    assert data_config(job.folder).caption == "json:other"
    storage.write_json(job.folder.checkpoint_manifest, {})
    record_config(job, "inventory")
    assert data_config(job.folder).caption == "json:other"


def test_the_revision_is_that_of_the_package_not_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GIT_DIR", raising=False)
    package, installed = tmp_path / "project" / "package", tmp_path / "project" / ".venv" / "package"
    for folder in (package, installed, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=Some One", "-c", "user.email=some@one.example"]
        command = ["git", "-C", str(tmp_path / "project"), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", "package")
    git("commit", "--quiet", "-m", "one")
    monkeypatch.chdir(tmp_path)
    assert git_revision(str(package)) == git("rev-parse", "HEAD")
    monkeypatch.chdir(package)
    assert git_revision(str(installed)) is None
    assert git_revision(str(tmp_path / "elsewhere")) is None


def test_a_run_that_goes_on_with_other_versions_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path / "run")
    say_other_versions(job)
    begin_record(job)
    say_other_versions(job)
    assert capsys.readouterr().err == ""
    tree = recorded(job)
    now = tree["versions"]["torch"]
    tree["versions"] |= {"torch": "1.0", "ray": "1.0"}
    storage.write_bytes(job.folder.config, yaml.safe_dump(tree).encode())
    say_other_versions(job)
    said = capsys.readouterr().err
    assert f"was begun with other versions: torch 1.0 then, {now} now\n" in said
    for broken in (b"{", b"- 1", b"versions: 3"):
        storage.write_bytes(job.folder.config, broken)
        say_other_versions(job)
    assert capsys.readouterr().err == ""
