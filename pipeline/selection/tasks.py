"""How the passes over the score files are split into tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Tasks of one pass: enough to share out, few enough that their results fit in the driver at once.
MAX_TASKS = 64


class MapTasks(Protocol):
    """Anything that maps like `map`: applies a picklable function to items and gives the results in order."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]:
        """Results of `function` in the order of `items`."""
        ...


def usable_cpus() -> int:
    """CPUs that this process may use; all of them where the system (macOS) has no way to say so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks(items: Sequence[Item], most: int = MAX_TASKS) -> list[Sequence[Item]]:
    """`items` in order, in at most `most` runs of nearly equal length."""
    count = min(most, len(items))
    ends = [len(items) * place // count for place in range(count + 1)] if count else []
    return [items[start:end] for start, end in pairwise(ends)]


def thread_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterable[Result]:
    """`map` with one thread per CPU: reading Parquet and counting in numpy run outside the interpreter's lock."""
    with ThreadPoolExecutor(usable_cpus()) as pool:
        yield from pool.map(function, items)
