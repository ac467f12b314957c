"""Ctrl-C: the first finishes what is in hand, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """While open, SIGINT and SIGTERM set `requested` once; the next one raises `KeyboardInterrupt`.

    Signals belong to the main thread: in any other thread nothing is installed and nothing is ever requested.
    """

    def __init__(self, announce: Callable[[], None]) -> None:
        self.requested = False
        self._announce = announce
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._announce()
