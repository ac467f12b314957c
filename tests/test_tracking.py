"""Trainings in experiment trackers: Weights & Biases without a network, and what is missing said before any work."""

from __future__ import annotations

import importlib.util
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from pipeline.config import parse_config
from pipeline.errors import ConfigError
from pipeline.run import RunFolder
from pipeline.tracking import Board


def offline_history(folder: Path, calls: int) -> list[dict[str, str]]:
    """The values that the one offline run of Weights & Biases below `folder` recorded, a mapping per call.

    It is written by a process of its own, which may be behind: waits until there are `calls`, for a minute at most.
    """
    deadline = time.monotonic() + 60
    while len(rows := _history(folder)) < calls and time.monotonic() < deadline:
        time.sleep(0.1)
    return rows


def _history(folder: Path) -> list[dict[str, str]]:
    """What is in the run's file so far.

    Its file is a log of records in LevelDB's format: after 7 bytes, each has a checksum (4 bytes), a size (2) and a
    type (1); a short log fits into the first block, where no record is cut in two.
    """
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    rows, position = [], 7
    while position + 7 <= len(content):
        size, kind = struct.unpack_from("<HB", content, position + 4)
        assert kind in (0, 1)
        if position + 7 + size > len(content):
            break
        record = wandb_internal_pb2.Record.FromString(content[position + 7 : position + 7 + size])
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
        position += 7 + size
    return rows


def test_both_trackers_hold_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = parse_config({"data": {"shards": "https://me:word@h/0.tar?sig=a"}, "track": {"wandb": "pairs"}})
    with Board(RunFolder(str(tmp_path)), config, "run-000") as board:
        for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
            board.log(step, {"loss": loss, "learning_rate": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run-000"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 2.0), (3, 1.0)]
    assert [(row["step"], row["loss"], row["learning_rate"]) for row in offline_history(tmp_path, 3)] == [
        ("1", "4", "0.5"),
        ("2", "2", "0.5"),
        ("3", "1", "0.5"),
    ]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"https://h/0.tar?..." in (content := file.read_bytes())
    assert b"word" not in content


def test_a_training_that_goes_on_replaces_what_it_repeats(tmp_path: Path) -> None:
    config = parse_config({"data": {"shards": []}})
    with Board(RunFolder(str(tmp_path)), config, "run-000") as board:
        for step in (1, 2, 3):
            board.log(step, {"loss": 1.0})
    with Board(RunFolder(str(tmp_path)), config, "run-000", first_step=2) as board:
        for step in (2, 3):
            board.log(step, {"loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run-000"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 9.0), (3, 9.0)]


def test_a_tracker_that_is_not_installed_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(ConfigError, match=r"track\.wandb: expected null, as wandb is not installed"):
        parse_config({"data": {"shards": []}, "track": {"wandb": "pairs"}})
