"""Plans of other settings that broke off are under no mark, however the checkpoints were divided among the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.failures import Failure
from pipeline.engine.tasks import TaskOutcome, _call
from pipeline.prepared import plan_url
from pipeline.stages import directions
from pipeline.stages.directions import compute_directions
from pipeline.stages.job import Job
from pipeline.store.task_marks import TaskMarks
from tests.engine.prepared_run import prepare_run
from tests.helpers import write_shards

APART, TOGETHER = [[0], [1]], [[0, 1]]

#: Of a task, as the config says.
GPUS = 0.25


def call(function: Callable[[Any], Any], item: Any, **_: Any) -> Any:
    """`run_task` in this process."""
    return function(item)


def in_turn(
    function: Callable[[Any], Any], items: Sequence[Any], *, marks: TaskMarks, gpus: float, **_: Any
) -> TaskOutcome:
    """`run_tasks` in this process, the last task first."""
    assert gpus == GPUS
    done = [number for number, _ in marks.finished(len(items))]
    for number in reversed(range(len(items))):
        if number not in done and isinstance(failure := _call(function, items[number], number, marks), Failure):
            raise RuntimeError(failure.message)
    return TaskOutcome(len(items), len(items))


@pytest.mark.parametrize(
    ("parts", "others", "after"),
    [(TOGETHER, TOGETHER, 1), (APART, TOGETHER, 2), (TOGETHER, APART, 1), (APART, APART, 1)],
)
def test_plans_of_other_settings_that_broke_off_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[list[int]], others: list[list[int]], after: int
) -> None:
    config, _, _ = prepare_run(str(tmp_path / "run"), write_shards(tmp_path / "in", shards=1, samples=20), pairs=4)
    first, second = (
        Job(
            config.model_copy(
                update={
                    "reference": config.reference.model_copy(update={"pairs": pairs}),
                    "engine": config.engine.model_copy(update={"stale": "redo", "gpus_per_worker": GPUS}),
                }
            )
        )
        for pairs in (8, 6)
    )
    written: list[int] = []

    def write(part: directions._Part) -> dict[str, str]:
        for number in part.numbers:
            Path(plan_url(config.out, number)).write_text(f"{part.config.reference.pairs}")
            written.append(number)
            if part.config is second.config and len(written) == after:
                raise RuntimeError("killed")
        return {}

    monkeypatch.setattr(directions, "run_task", call)
    monkeypatch.setattr(directions, "run_tasks", in_turn)
    monkeypatch.setattr(directions, "_write_plans", write)
    for job, divided in ((first, parts), (second, others), (first, parts)):
        written.clear()
        monkeypatch.setattr(
            directions, "_draw", lambda _, divided=divided: {"basis": {}, "files": {}, "parts": divided}
        )
        with pytest.raises(RuntimeError, match="killed") if job is second else nullcontext():
            compute_directions(job)
    assert [Path(plan_url(config.out, number)).read_text() for number in range(2)] == ["8", "8"]
