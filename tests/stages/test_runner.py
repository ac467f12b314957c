from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

import pytest

from pipeline.stages.runner import command_line


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
