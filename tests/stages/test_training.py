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
    training.require_checkpoints(job)
    proxy = config.proxy.model_copy(update={"steps": 2, "batch_size": 4})
    monkeypatch.setattr(training, "train_runs", broken_off)
    with pytest.raises(KeyboardInterrupt):
        train(Job(config.model_copy(update={"proxy": proxy})))
    assert storage.exists(job.folder.checkpoint_manifest)
    assert not storage.exists(job.folder.directions_mark)
    with pytest.raises(StageError, match="no finished checkpoints of these settings"):
        training.require_checkpoints(job)


@pytest.mark.parametrize("stale", ["refuse", "redo"])
def test_checkpoints_of_other_settings_are_not_scored_at(config: Config, tmp_path: Path, stale: str) -> None:
    none = r"no finished checkpoints of these settings in .*: run `diffprune train"
    job = taking_over(config, tmp_path, 0, 1)
    train(job)
    training.require_checkpoints(job)
    with pytest.raises(StageError, match=none):
        training.require_checkpoints(Job(config.model_copy(update={"seed": 1})))  # which trains its own
    engine = config.engine.model_copy(update={"stale": stale})
    other = taking_over(config.model_copy(update={"engine": engine}), tmp_path, 2, 1)
    refused = pytest.raises(FingerprintError, match=r"imported\.json was made with other settings \(sources")
    with refused if stale == "refuse" else pytest.raises(StageError, match=none):
        training.require_checkpoints(other)


@pytest.mark.parametrize("stale", ["refuse", "redo"])
def test_scores_are_of_runs_trained_with_this_config_where_they_were_trained_here(config: Config, stale: str) -> None:
    """The prepared run's mark says that its checkpoints were."""
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"stale": stale})})
    job = Job(config)
    training.check_trained(job)
    other = Job(config.model_copy(update={"seed": 1}))
    refused = pytest.raises(
        FingerprintError, match=r"trained\.json was made with other settings \(.*seed: 0 there, 1 now"
    )
    with refused if stale == "refuse" else pytest.raises(StageError, match="no finished checkpoints of these settings"):
        training.check_trained(other)
    storage.remove(storage.join(job.folder.checkpoints, "trained.json"))
    training.check_trained(other)


def broken_off(*_: object) -> list[int]:
    raise KeyboardInterrupt
