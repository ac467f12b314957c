"""Choosing begins when every shard is scored, or set aside where that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine.failures import Aside, Failure, set_aside
from pipeline.errors import StageError
from pipeline.stages.job import Job
from pipeline.stages.selecting import require_scores
from pipeline.store import storage
from tests.emit.made_run import make_run


def test_a_shard_that_is_still_to_be_scored_is_none_of_those_that_may_fail(
    make_shards: Callable[..., list[str]], tmp_path: Path
) -> None:
    made = make_run(tmp_path / "run", make_shards(shards=3), engine={"allowed_failures": 0.4})
    job = Job(made.config)
    require_scores(job)
    storage.remove(made.run.score_mark(1))
    with pytest.raises(StageError, match="1 of 3 shards have no scores: run `diffprune score CONFIG` first"):
        require_scores(job)
    set_aside(made.run.failure_file(1), Aside(1, "00001.tar", Failure("OSError", "torn"), 4))
    require_scores(job)
    set_aside(made.run.failure_file(2), Aside(2, "00002.tar", Failure("OSError", "torn"), 4))
    storage.remove(made.run.score_mark(2))
    with pytest.raises(StageError, match="2 of 3 shards have no scores"):
        require_scores(job)
