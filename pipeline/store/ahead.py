"""Many round trips to storage, several of them at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Round trips at the same time, and those begun before their results are wanted.
THREADS = 16
AHEAD = 16 * THREADS


def each(function: Callable[[Item], object], items: Sequence[Item]) -> None:
    """`function` of each item, called in a few threads."""
    for _ in in_order(function, items):
        pass


def in_order(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`function` of each item, in order, called in a few threads; memory is that of `AHEAD` results."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(items), AHEAD):
            yield from pool.map(function, items[start : start + AHEAD])
