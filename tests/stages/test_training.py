"""Checkpoints trained and taken over lie in the same places: no mark of the one vouches for files of the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from pipeline.config import Config
from pipeline.engine.progress import Display, Tally
from pipeline.errors import FingerprintError, InputError, StageError
from pipeline.models.clip import build_model
from pipeline.models.manifest import Manifest
from pipeline.stages import training
from pipeline.stages.directions import compute_directions
from pipeline.stages.job import Job
from pipeline.stages.training import train
from pipeline.store import storage
from tests.engine.prepared_run import prepare_run
from tests.helpers import write_shards


def call(function: Callable[[Any], Any], item: Any, **_: Any) -> Any:
    """`run_task` in this process."""
    return function(item)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(training, "run_task", call)
    config, _, _ = prepare_run(str(tmp_path / "run"), write_shards(tmp_path / "in", shards=1, samples=20), pairs=4)
    engine = config.engine.model_copy(update={"stale": "redo"})
    for number in range(4):
        state = build_model(config.proxy.model, seed=number).state_dict()
        safetensors.torch.save_file(state, tmp_path / f"{number}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"{}")
    return config.model_copy(update={"engine": engine})


def taking_over(config: Config, folder: Path, *names: object) -> Job:
    update = {
        "checkpoints": [str(folder / f"{name}.safetensors") for name in names],
        "checkpoint_steps": [1, 2],
        "checkpoint_rates": [0.1, 0.1],
    }
    return Job(config.model_copy(update={"proxy": config.proxy.model_copy(update=update)}))


def checksums(job: Job) -> list[str]:
    return [storage.file_checksum(entry.path) for entry in Manifest.read(job.folder.checkpoint_manifest).checkpoints]


def test_files_of_a_take_over_that_broke_off_are_replaced(config: Config, tmp_path: Path) -> None:
    job = taking_over(config, tmp_path, 0, 1)
    train(job)
    before = checksums(job)
    with pytest.raises(InputError):
        train(taking_over(config, tmp_path, 2, "broken"))
    assert not storage.exists(job.folder.checkpoint_manifest)
    train(job)
    assert checksums(job) == before


def test_training_and_taking_over_end_each_others_marks(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: object) -> list[int]:
        training.run_task(training._write_taken_over, other.config)
        return [2]

    other = taking_over(config, tmp_path, 2, 3)
    monkeypatch.setattr(training, "train_runs", trained)
    proxy = config.proxy.model_copy(update={"steps": 2, "batch_size": 4})
    jobs = [taking_over(config, tmp_path, 0, 1), Job(config.model_copy(update={"proxy": proxy}))]
    found = []
    for job in jobs * 2:
        train(job)
        found.append(checksums(job))
    assert found[:2] == found[2:]
    assert found[0] != found[1]


def test_steps_that_a_run_takes_again_are_counted_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run's worker is lost after 90 steps and goes on from the resume point after 20."""
    shown: list[tuple[int, int]] = []

    def trained(job: Any, progress: Callable[[int, dict[str, Any]], None], note: Any) -> list[int]:
        for run, step in [(0, 40), (0, 90), (1, 10), (0, 30), (1, 50), (0, 100), (1, 100)]:
            progress(run, {"step": step, "steps": 100})
        return [100, 100]

    monkeypatch.setattr(training, "train_runs", trained)
    monkeypatch.setattr(Display, "tick", lambda display: shown.append((display.tally.done, display.tally.total)))
    proxy = config.proxy.model_copy(update={"steps": 100, "batch_size": 4, "runs": 2, "checkpoints": None})
    train(Job(config.model_copy(update={"proxy": proxy})))
    assert shown == [(done, 200) for done in (40, 90, 100, 40, 80, 150, 200)]


def test_steps_of_an_earlier_call_count_in_no_rate() -> None:
    now = 0.0
    tally, taken = Tally(200, clock=lambda: now), [0, 0]
    training._count(tally, taken, 0, 60)
    training._count(tally, taken, 1, 50)
    assert (tally.done, tally.seconds_left()) == (110, None)
    now = 10.0
    training._count(tally, taken, 1, 60)
    assert (tally.done, tally.seconds_left()) == (120, 80.0)


def test_what_decides_a_run_beside_its_settings_goes_with_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it does not go on from a resume point, or count as done, where pairs are read in another way."""
    seen: list[dict[str, Any]] = []

    def trained(job: Any, *_: object) -> list[int]:
        seen.append(dict(job.identity))
        return [2]

    monkeypatch.setattr(training, "train_runs", trained)
    proxy = config.proxy.model_copy(update={"steps": 2, "batch_size": 4})
    for data in ({}, {"caption": "json:caption"}, {"max_pixels": 10}, {"draft": 2.0}):
        update = {"proxy": proxy, "data": config.data.model_copy(update=data)}
        train(Job(config.model_copy(update=update)))
    assert len(set(map(str, seen))) == 4


def test_checkpoints_that_are_replaced_are_no_finished_stage_and_leave_no_directions(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = taking_over(config, tmp_path, 0, 1)
    train(job)
    storage.write_json(job.folder.directions_mark, {"fingerprint": ""})
    train(job)
    assert storage.exists(job.folder.directions_mark)
    assert training.has_checkpoints(job)
    proxy = config.proxy.model_copy(update={"steps": 2, "batch_size": 4})
    monkeypatch.setattr(training, "train_runs", broken_off)
    with pytest.raises(KeyboardInterrupt):
        train(Job(config.model_copy(update={"proxy": proxy})))
    assert storage.exists(job.folder.checkpoint_manifest)
    assert not storage.exists(job.folder.directions_mark)
    with pytest.raises(StageError, match="no finished checkpoints"):
        compute_directions(job)


def broken_off(*_: object) -> list[int]:
    raise KeyboardInterrupt


def test_shards_of_one_file_name_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    training._warn_of_equal_names(["a/0.tar", "b/1.tar"])
    assert not capsys.readouterr().err
    training._warn_of_equal_names(["a/0.tar", "b/1.tar", "s3://c/1.tar"])
    assert "2 shards are named 1.tar" in capsys.readouterr().err


def test_another_list_of_shards_replaces_no_inventory_that_something_was_made_of(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", shards=3, samples=20)
    config, _, _ = prepare_run(str(tmp_path / "run"), shards[:2], pairs=4)
    job = Job(config)
    storage.write_json(job.folder.score_mark(0), {})
    assert set(training._known_shards(job, shards[:2])) == {0, 1}
    for urls, difference in (
        (shards[:1], f"1 left out, {shards[1]} for one"),
        (shards[1:], f"1 left out, {shards[0]} for one; 1 added, {shards[2]} for one"),
        (shards[1::-1], "the same ones in another order"),
    ):
        with pytest.raises(FingerprintError, match="lists other shards than the config") as refused:
            training._known_shards(job, urls)
        assert difference in str(refused.value)
    redo = config.model_copy(update={"engine": config.engine.model_copy(update={"stale": "redo"})})
    assert training._known_shards(Job(redo), shards[:1]) == {}
    storage.remove(job.folder.score_mark(0))
    storage.remove(job.folder.checkpoint_manifest)
    assert training._known_shards(job, shards[:1]) == {}
