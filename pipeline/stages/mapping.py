"""A `map` over Ray tasks, and a call in one, for stages whose work is a list of items, such as resharding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from pipeline.engine.tasks import run_task, run_tasks
from pipeline.patience import Patience
from pipeline.selection.tasks import thread_map
from pipeline.stages.job import Job

#: Fewer items go through one task: more would be over before their workers had started.
WORTH_A_CLUSTER = 32


def apart(job: Job, stage: str) -> Callable[[Callable[[Any], Any], Any], Any]:
    """A function that calls a function with one item in a task."""

    def call(function: Callable[[Any], Any], item: Any, /) -> Any:
        return run_task(function, item, stage=stage, config=job.config.engine)

    return call


def ordered_map(job: Job, stage: str, unit: str, at_least: int = WORTH_A_CLUSTER) -> Callable[..., Iterable[Any]]:
    """A function like `map` with one argument: results in the order of the items, computed anywhere."""

    def apply(function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]:
        listed = list(items)
        if len(listed) < at_least:
            done: list[Any] = apart(job, stage)(partial(_all_of, function), listed)
            return done
        found: dict[int, Any] = {}
        outcome = run_tasks(
            function,
            listed,
            run=job.folder,
            stage=stage,
            config=job.config.engine,
            on_result=found.__setitem__,
            name=lambda item: str(item)[:200],
            unit=unit,
            patience=Patience(job.config.engine.shard_timeout),
        )
        outcome.check(stage)
        return [found[number] for number in range(len(listed))]

    return apply


def _all_of(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    return list(thread_map(function, items))
