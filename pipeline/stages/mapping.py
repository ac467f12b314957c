"""A `map` over Ray tasks for stages whose work is a list of items, such as resharding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.engine.tasks import run_tasks
from pipeline.stages.job import Job

#: With fewer items the work is done before a Ray worker would have started.
WORTH_A_CLUSTER = 32


def ordered_map(job: Job, stage: str, unit: str, at_least: int = WORTH_A_CLUSTER) -> Callable[..., Iterable[Any]]:
    """A function like `map` with one argument: results in the order of the items, computed anywhere."""

    def apply(function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]:
        listed = list(items)
        if len(listed) < at_least:
            return map(function, listed)
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
        )
        outcome.check(stage)
        return [found[number] for number in range(len(listed))]

    return apply
