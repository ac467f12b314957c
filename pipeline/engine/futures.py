"""Puts what becomes of Ray's references into the queue of a loop, as it comes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def tell(put: Callable[[Any], None], ref: Any, *about: Any) -> None:
    """Have `put((*about, result))` called once Ray has the result, or the error in its place."""

    def report(future: Future[Any]) -> None:
        put((*about, future.exception() or future.result()))

    ref.future().add_done_callback(report)
