"""A shard that fails for good: the others are scored, the exit status and the list say so, and it can be made good."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import invoke
from pipeline.config import dump_config
from pipeline.emit.verify import verify
from pipeline.run import RunFolder
from pipeline.stages.runner import run_stage
from tests.helpers import write_shards
from tests.integration.runs import small_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def test_a_failed_shard_is_status_1_unless_a_share_may_fail_and_is_taken_up_again_when_asked_for(
    make_shards: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(shards=3)
    config = small_config(shards, tmp_path / "run", engine={"retries": 1, "retry_wait": 0.01})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    for stage in ("inventory", "train", "directions"):
        run_stage(stage, config)
    shutil.copy2(shards[1], tmp_path / "kept.tar")
    damaged, before = Path(shards[1]), Path(shards[1]).stat()
    other = Path(write_shards(tmp_path / "other", shards=1, samples=5)[0]).read_bytes()
    damaged.write_bytes(other + b"\0" * (before.st_size - len(other)))
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))  # storage says that it is the same file
    run = RunFolder(config.out)

    assert invoke(["run", str(file)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: score: 1 of 3 shards failed ({shards[1]}: InputError: {shards[1]}: expected the 8 ")
    assert last.endswith("--retry-failed takes them up again")
    why = json.loads(Path(run.failure_file(1)).read_text())
    assert (why["name"], why["attempts"], why["failure"]["exception"]) == (shards[1], 2, "InputError")
    assert why["failure"]["node"]
    scored = [path.stat().st_mtime_ns for path in sorted(Path(run.scores).iterdir())]
    assert len(scored) == 4, "file and mark of each of the others"

    assert invoke(["run", str(file), "--set", "engine.allowed_failures=0.4"]) == 0
    summary = json.loads(Path(run.summary).read_text())
    assert shards[1] in json.dumps(summary["scores"]["failed_shards"])
    assert [path.stat().st_mtime_ns for path in sorted(Path(run.scores).iterdir())] == scored
    assert verify(run) == []

    shutil.copy2(tmp_path / "kept.tar", shards[1])
    assert invoke(["run", str(file)]) == 1, "what was set aside stays there"
    assert invoke(["run", str(file), "--retry-failed"]) == 0
    assert len(list(Path(run.scores).iterdir())) == 6
    assert not Path(run.failure_file(1)).exists()
    assert verify(run) == []
