"""A recorded run: complete, resumable at every moment with the same bytes, and readable for a replay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config import Config
from pipeline.errors import FingerprintError, InputError, StageError
from pipeline.influence.losses import batch_loss
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.manifest import Manifest
from pipeline.models.takeover import import_checkpoints
from pipeline.replay.files import RecordFolder
from pipeline.replay.proxy import train_proxy
from pipeline.replay.record import Record, step_rule, trained_ids
from pipeline.replay.schedule import TrainingSettings, data_order, learning_rates
from pipeline.replay.train import Trainer
from pipeline.replay.workers import Alone
from pipeline.run import RunFolder
from pipeline.stages.plans import exact_replay
from pipeline.store import storage
from tests.replay.pairs import Factory, MemoryPairs, config_of


def train(folder: Path | str, config: Config, factory: Factory, run: int = 0, **options: Any) -> Record:
    return train_proxy(config, factory, MemoryPairs(), RunFolder(str(folder)), run, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the record but the progress, which tells when it was written."""
    files = (folder / "checkpoints").rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.is_file() and p.name != "progress.json"}


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    return Factory(tmp_path_factory.mktemp("model"))


class Killed(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


def killing(at: int) -> Callable[[int, float, float], None]:
    def progress(step: int, loss: float, lr: float) -> None:
        if step == at:
            raise Killed

    return progress


def test_the_folder_says_everything(tmp_path: Path, factory: Factory) -> None:
    config = config_of()
    seen: list[tuple[int, float, float]] = []
    record = train(tmp_path, config, factory, progress=lambda *step: seen.append(step))
    manifest = Manifest.read(str(tmp_path / "checkpoints" / "manifest.json"))
    rates = learning_rates(TrainingSettings.of(config, 24))
    assert (manifest.dataset_size, manifest.optimizer) == (24, "adamw")
    assert [(e.step, e.lr, e.run, e.seed) for e in manifest.checkpoints] == [
        (4, rates[3], 0, 0),
        (8, rates[7], 0, 0),
        (12, rates[11], 0, 0),
    ]
    assert all(storage.exists(entry.path) for entry in manifest.checkpoints)
    assert [step for step, _, _ in seen] == list(range(1, 13))
    assert [loss for _, loss, _ in seen] == record.losses.tolist()
    assert [lr for _, _, lr in seen] == rates.tolist()
    names = {path.name for path in (tmp_path / "checkpoints" / "run-000").iterdir()}
    assert not {name for name in names if name.startswith(("resume", ".tmp"))}
    board = EventAccumulator(str(tmp_path / "tensorboard" / "run-000"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 13))
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(record.losses.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    "proxy", [{"augment": True}, {"optimizer": "sgd", "momentum": 0.9}, {"grad_clip": 0.1, "subset": 0.5}]
)
def test_a_replay_from_the_record_reaches_every_checkpoint(tmp_path: Path, factory: Factory, proxy: Any) -> None:
    """From the initial weights, the pairs of each step and the rates alone, with torch's optimizers."""
    record = train(tmp_path, config_of(**proxy), factory)
    s = record.settings
    model = factory(7)
    initial = record.initial(model)
    assert (initial.step, initial.adam) == (0, None)
    model.load_state_dict(initial.params | initial.buffers)
    decay = step_rule(s, initial.params).weight_decay
    assert set(decay.values()) == {0.0, 0.1}
    parameters = dict(model.named_parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters.values(), betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=0)
        if s.optimizer == "adamw"
        else torch.optim.SGD(parameters.values(), momentum=s.momentum)
    )
    wanted = {entry.step: entry.load(model) for entry in record.checkpoints}
    for step, rate in enumerate(record.rates):
        batch = record.pairs(MemoryPairs(), step)
        loss = batch_loss(model(batch.images, batch.tokens), torch.zeros(8, 8, dtype=torch.bool), "clip")
        assert loss.item() == record.losses[step]
        optimizer.zero_grad()
        loss.backward()
        if s.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), s.grad_clip)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.mul_(1 - rate * decay[name])
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.step()
        if step + 1 in wanted:
            for name, value in wanted[step + 1].params.items():
                assert torch.equal(parameters[name], value), name
    assert record.exact
    if s.optimizer == "sgd":
        assert wanted[12].momentum is not None
    else:
        assert wanted[12].adam is not None
        assert wanted[12].adam.steps == 12


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"precision": "tf32"}])
def test_a_run_in_lower_precision_is_not_exactly_replayable(tmp_path: Path, factory: Factory, changes: Any) -> None:
    config = config_of(**changes)
    assert not train(tmp_path, config, factory).exact
    job = SimpleNamespace(folder=RunFolder(str(tmp_path)))
    with pytest.raises(InputError, match=r"replay: exact repeats training in .*float32.*proxy\.precision.*checkpoints"):
        exact_replay(job, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path: Path, factory: Factory, optimizer: str) -> None:
    config = config_of(optimizer=optimizer, momentum=0.5, augment=True)
    train(tmp_path / "whole", config, factory)
    whole = contents(tmp_path / "whole")
    for at in (1, 5, 9):
        cut = tmp_path / f"cut-{at}"
        with pytest.raises(Killed):
            train(cut, config, factory, progress=killing(at))
        assert not (cut / "checkpoints" / "manifest.json").exists()
        with pytest.raises(StageError, match="diffprune train"):
            Record.read(RunFolder(str(cut)))
        steps: list[int] = []
        train(cut, config, factory, progress=lambda step, loss, lr, steps=steps: steps.append(step))
        assert steps[0] == at // 5 * 5 + 1
        assert contents(cut) == whole


def test_killed_while_writing_a_resume_point_it_uses_the_one_before(
    tmp_path: Path, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    train(tmp_path / "whole", config, factory)
    from pipeline.replay import proxy

    real = proxy.marks.write_mark

    def write_mark(url: str, fingerprint: Any, content: dict[str, Any]) -> None:
        if content.get("step") == 10:
            raise Killed
        real(url, fingerprint, content)

    monkeypatch.setattr(proxy.marks, "write_mark", write_mark)
    with pytest.raises(Killed):
        train(tmp_path / "cut", config, factory)
    monkeypatch.undo()
    steps: list[int] = []
    train(tmp_path / "cut", config, factory, progress=lambda step, loss, lr: steps.append(step))
    assert steps[0] == 6
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_training_goes_on_while_a_resume_point_is_written(
    tmp_path: Path, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.replay import proxy

    config, gone_on, real = config_of(), threading.Event(), proxy.save_checkpoint
    train(tmp_path / "whole", config, factory)

    def save_checkpoint(url: str, checkpoint: Any) -> None:
        if "resume" in url:
            assert gone_on.wait(20)
        real(url, checkpoint)

    def progress(step: int, loss: float, rate: float) -> None:
        if step == 7:
            gone_on.set()
        elif step == 9:
            raise Killed

    monkeypatch.setattr(proxy, "save_checkpoint", save_checkpoint)
    with pytest.raises(Killed):
        train(tmp_path / "cut", config, factory, progress=progress)
    mark = storage.read_json(str(tmp_path / "cut" / "checkpoints" / "run-000" / "resume.json"))
    assert (mark["step"], len(mark["losses"])) == (5, 5)
    train(tmp_path / "cut", config, factory)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_resume_point_that_another_worker_removed_is_done_without(tmp_path: Path, factory: Factory) -> None:
    config = config_of()
    train(tmp_path / "whole", config, factory)
    with pytest.raises(Killed):
        train(tmp_path / "cut", config, factory, progress=killing(7))
    (tmp_path / "cut" / "checkpoints" / "run-000" / "resume-00000005.safetensors").unlink()
    steps: list[int] = []
    train(tmp_path / "cut", config, factory, progress=lambda step, loss, lr: steps.append(step))
    assert steps[0] == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_worker_that_does_not_see_the_mark_yet_goes_on_where_the_first_does(
    tmp_path: Path, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Alone):
        rank = 1

        def agree(self, number: int) -> int:
            return 5

    with pytest.raises(Killed):
        train(tmp_path, config_of(), factory, progress=killing(7))
    (tmp_path / "checkpoints" / "run-000" / "resume.json").unlink()
    steps: list[int] = []

    def advance(trainer: Trainer) -> float:
        steps.append(trainer.step)
        raise Killed

    monkeypatch.setattr(Trainer, "advance", advance)
    with pytest.raises(Killed):
        train(tmp_path, config_of(), factory, workers=Second())
    assert steps == [5]


def test_a_killed_process_is_continued(tmp_path: Path, factory: Factory) -> None:
    code = f"""
import time
from pathlib import Path
from tests.replay.pairs import Factory, MemoryPairs, config_of
from pipeline.replay.proxy import train_proxy
from pipeline.run import RunFolder
folder = Path({str(tmp_path)!r})
config = config_of(steps=60, resume_every=3)
slowly = lambda *step: time.sleep(0.02)
train_proxy(config, Factory(folder), MemoryPairs(), RunFolder(str(folder / "cut")), progress=slowly)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    mark = tmp_path / "cut" / "checkpoints" / "run-000" / "resume.json"
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert mark.exists()
    config = config_of(steps=60, resume_every=3)
    steps: list[int] = []
    train(tmp_path / "cut", config, Factory(tmp_path), progress=lambda step, loss, lr: steps.append(step))
    train(tmp_path / "whole", config, Factory(tmp_path))
    assert steps[0] > 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(tmp_path: Path, factory: Factory) -> None:
    train(tmp_path, config_of(), factory)
    before = contents(tmp_path)
    (tmp_path / "checkpoints" / "manifest.json").unlink()
    for name in ("resume.json", "resume-00000010.safetensors"):  # killed right after its mark was written
        (tmp_path / "checkpoints" / "run-000" / name).write_bytes(b"{}")
    record = train(tmp_path, config_of(), factory, progress=killing(1))
    assert len(record.checkpoints) == 3
    assert contents(tmp_path) == before


def test_other_settings_are_refused_or_redone_but_never_mixed(tmp_path: Path, factory: Factory) -> None:
    train(tmp_path, config_of(), factory)
    with pytest.raises(FingerprintError, match=r"training\.lr"):
        train(tmp_path, config_of(lr=2e-3), factory)
    with pytest.raises(FingerprintError, match="identity"):
        train(tmp_path, config_of(), factory, identity={"inventory": "another"})
    with pytest.raises(FingerprintError, match="rows"):
        train(tmp_path, config_of(subset=0.9), factory)
    with pytest.raises(Killed):
        train(tmp_path, config_of(lr=2e-3, stale="redo"), factory, progress=killing(7))
    assert not (tmp_path / "checkpoints" / "manifest.json").exists()
    with pytest.raises(FingerprintError, match=r"training\.lr"):
        train(tmp_path, config_of(), factory)
    train(tmp_path, config_of(num_checkpoints=2, stale="redo"), factory)
    train(tmp_path / "new", config_of(num_checkpoints=2), factory)
    assert contents(tmp_path).keys() >= contents(tmp_path / "new").keys()
    found = {path.name for path in (tmp_path / "checkpoints" / "run-000").glob("step-*")}
    assert found == {"step-00000006.safetensors", "step-00000012.safetensors"}


def test_several_runs_share_a_manifest_that_comes_last(tmp_path: Path, factory: Factory) -> None:
    config = config_of(runs=3, subset=0.5, num_checkpoints=2)
    folder = RunFolder(str(tmp_path))
    records = []
    for run in (2, 0, 1):
        assert not storage.exists(folder.checkpoint_manifest)
        records.append(train(tmp_path, config, factory, run))
    manifest = Manifest.read(folder.checkpoint_manifest)
    assert manifest.runs == [0, 1, 2]
    assert [(e.run, e.step) for e in manifest.checkpoints] == [(r, s) for r in range(3) for s in (6, 12)]
    assert manifest.dataset_size == 12
    orders = [set(record.order.ravel().tolist()) for record in records]
    assert all(len(rows) == 12 for rows in orders)
    assert orders[0] != orders[1] != orders[2]
    first = [record.initial().params["visual.proj"] for record in records]
    assert not torch.equal(first[0], first[1])


def test_the_record_names_the_pairs_that_a_run_was_trained_on(tmp_path: Path, factory: Factory) -> None:
    folder, pairs = RunFolder(str(tmp_path)), MemoryPairs()
    config = config_of(runs=2, subset=0.5)
    orders = [train_proxy(config, factory, pairs, folder, run).order for run in range(2)]
    trained = [trained_ids(folder, run) for run in range(2)]
    for order, ids in zip(orders, trained, strict=True):
        assert ids.tolist() == sorted(set(pairs.ids[order.ravel()].tolist()))
    assert not set(trained[0]) & set(trained[1])
    with pytest.raises(StageError, match=r"run-002/trained.npy: expected the pairs that the run was trained on"):
        trained_ids(folder, 2)


def test_the_order_is_the_one_that_the_settings_give(tmp_path: Path, factory: Factory) -> None:
    record = train(tmp_path, config_of(seed=5), factory)
    assert np.array_equal(record.order, data_order(np.arange(24), record.settings))
    assert record.order.dtype == np.int32


def test_a_diverged_run_is_none(tmp_path: Path, factory: Factory) -> None:
    config = config_of(lr=1e30, optimizer="sgd", warmup=0)
    with pytest.raises(StageError, match="diverged"):
        train(tmp_path, config, factory)
    assert not storage.exists(RecordFolder.of(RunFolder(str(tmp_path)), 0).mark)


def test_a_run_on_an_object_store_has_the_same_bytes(tmp_path: Path, factory: Factory, s3_bucket: Any) -> None:
    config = config_of(num_checkpoints=1, steps=3)
    train(tmp_path, config, factory)
    record = train(f"{s3_bucket.url}/run", config, factory)
    for name, data in contents(tmp_path).items():
        assert storage.read_bytes(f"{s3_bucket.url}/run/{name}") == data, name
    assert load_checkpoint(record.checkpoints[0].path).step == 3


def test_checkpoints_taken_over_in_its_place_end_a_record(tmp_path: Path, factory: Factory) -> None:
    """Else the record would vouch for the weights of others, and a replay start from them."""
    train(tmp_path, config_of(), factory)
    before = contents(tmp_path)
    plain = str(tmp_path / "plain.safetensors")
    safetensors.torch.save_file(factory(1).state_dict(), plain)
    import_checkpoints([plain], factory(0), str(tmp_path / "checkpoints"), 9, steps=[12], rates=[0.1])
    assert contents(tmp_path) != before
    with pytest.raises(StageError, match="checkpoints of other programs have none"):
        Record.read(RunFolder(str(tmp_path)))
    train(tmp_path, config_of(), factory)
    assert contents(tmp_path) == before
