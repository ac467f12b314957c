from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.engine import lease
from pipeline.errors import ConfigError, StageError
from pipeline.stages import runner
from pipeline.stages.job import Job
from pipeline.stages.runner import command_line, run_stage


@pytest.mark.parametrize(
    ("script", "module", "command"),
    [
        ("/venv/bin/diffprune", None, "diffprune --set 'select.keep={threshold: 1}' 'my run.yaml'"),
        ("/job/jobs/prune.py", "jobs.prune", "python -m jobs.prune --set 'select.keep={threshold: 1}' 'my run.yaml'"),
        ("/mine/script.py", None, ""),
        ("/mine/script.py", "mine.script", ""),
    ],
)
def test_the_command_is_one_that_can_be_typed_again(
    monkeypatch: pytest.MonkeyPatch, script: str, module: str | None, command: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--set", "select.keep={threshold: 1}", "my run.yaml"])
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert command_line() == command


def test_evaluate_without_pairs_to_measure_on_starts_nothing(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "connect", lambda engine: pytest.fail("a cluster was started"))
    for section in ({}, {"evaluate": {"seeds": 1}}):
        with pytest.raises(ConfigError, match=r"evaluate\.shards: expected pairs to measure on"):
            run_stage("evaluate", parse_config({"data": {"shards": make_shards()}, **section}))


@pytest.mark.parametrize(("stage", "begun"), [("inventory", True), ("validate", True), ("train", False)])
def test_stages_that_need_none_before_them_begin_the_record_of_a_run(
    make_shards: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str, begun: bool
) -> None:
    def refuse(job: Any, stage: str) -> None:
        raise StageError("refused")

    monkeypatch.setattr(runner, "connect", lambda engine: nullcontext())
    monkeypatch.setattr(runner, "_prepare", lambda config, proxy: None)
    monkeypatch.setattr(runner, "_run", refuse)
    with pytest.raises(StageError, match="refused"):
        run_stage(stage, parse_config({"data": {"shards": make_shards()}, "out": str(tmp_path / "run")}))
    assert (tmp_path / "run" / "config.yaml").exists() == begun


@pytest.mark.parametrize(
    ("stage", "refused"),
    [("inventory", True), ("train", True), ("directions", True), ("score", True), ("select", False), ("report", False)],
)
def test_up_to_the_scores_there_is_one_driver(
    make_shards: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str, refused: bool
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(runner, "connect", lambda engine: nullcontext())
    monkeypatch.setattr(runner, "_prepare", lambda config, proxy: None)
    monkeypatch.setattr(runner, "_run_one", lambda job, name, retry_failed: ran.append(name))
    monkeypatch.setattr(lease, "EVERY", 0.1)
    config = parse_config({"data": {"shards": make_shards()}, "out": str(tmp_path / "run")})
    with lease.alone(Job(config).folder.driver, pytest.fail):
        # As if the other were a process of its own: this one's number would count as that of one before it.
        monkeypatch.setattr(lease.os, "getpid", lambda: -1)
        if refused:
            with pytest.raises(StageError, match=r"driver\.json: process \d+ on .* works on this folder"):
                run_stage(stage, config)
        else:
            run_stage(stage, config)
    assert ran == ([] if refused else [stage])


def test_a_stage_that_is_complete_leaves_nothing_of_writers_that_were_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(parse_config({"data": {"shards": "a.tar"}, "out": str(run)}))
    for stage, folder in (("inventory", "demo/train"), ("evaluate", "cache/evaluation"), ("directions", "cache")):
        left = run / folder / ".tmp-0-progress.json"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.touch()
        with runner._stage(job, stage):
            pass
        assert not left.exists()
