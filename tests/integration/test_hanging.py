"""Stages whose tasks hang, on shards of a web server that never answers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.stages.runner import run_all, run_stage
from pipeline.store import storage
from tests.integration.runs import small_config
from tests.web import WebServer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

#: More than a task takes to start on a busy machine.
HASTY = {"retry_wait": 0.01, "retries": 0, "task_timeout": 20}


@pytest.fixture
def stuck() -> Iterator[str]:
    """A shard of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/00000.tar"


@pytest.mark.slow
def test_directions_that_hang_end_with_the_reason(
    make_shards: Callable[..., list[str]], tmp_path: Path, stuck: str
) -> None:
    target = {"kind": "shards", "shards": stuck, "pairs": 4}
    config = small_config(make_shards(shards=2), tmp_path / "run", target=target, engine=HASTY)
    run_stage("inventory", config)
    run_stage("train", config)
    with pytest.raises(StageError, match=r"^directions: hung: it had not come back after 20 s"):
        run_stage("directions", config)
    assert not storage.exists(RunFolder(config.out).directions_mark)


@pytest.mark.slow
def test_an_evaluation_that_hangs_ends_with_the_reason(
    make_shards: Callable[..., list[str]], tmp_path: Path, stuck: str
) -> None:
    shards = make_shards(shards=3)
    run_all(small_config(shards, tmp_path / "run"))
    evaluate = {"shards": stuck, "seeds": 1, "baselines": ["random"], "steps": 2}
    with pytest.raises(StageError, match=r"^evaluate: hung: it had not come back after 20 s"):
        run_stage("evaluate", small_config(shards, tmp_path / "run", evaluate=evaluate, engine=HASTY))
    with WebServer(Path(shards[0]).parent, mute=True) as server:
        evaluate["shards"] = f"{server.url}/{Path(shards[0]).name}"
        config = small_config(shards, tmp_path / "run", evaluate=evaluate, engine=HASTY)
        with pytest.raises(StageError, match=r"^evaluate: 2 of 2 failed: .*, seed 0: TaskHung: no news for 20 s"):
            run_stage("evaluate", config)
    assert len(storage.list_files(storage.join(config.out, "failed", "evaluate"), ".json")) == 2
    evaluate["shards"] = shards[0]
    run_stage("evaluate", small_config(shards, tmp_path / "run", evaluate=evaluate, engine=HASTY))
    assert storage.exists(storage.join(config.out, "evaluation", "results.json"))
    assert storage.list_files(storage.join(config.out, "failed", "evaluate"), ".json") == []
    assert storage.list_files(storage.join(config.out, "evaluation", "progress"), ".json") == []
