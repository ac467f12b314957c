"""A sign of life: a small JSON file that a process renews while it works, and another one reads."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from pipeline.store import storage

#: Seconds between two writings at least.
EVERY = 2.0


class Pulse:
    """Writes how far work is to `url`, every `EVERY` seconds at most.

    Storage that fails is no reason to end the work: it is silent then.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._written = 0.0

    def beat(self, state: dict[str, Any], *, now: bool = False) -> None:
        """Write `state`, if the last one is old enough, or `now` whatever it is."""
        time_now = time.monotonic()
        if now or time_now - self._written >= EVERY:
            self._written = time_now
            with suppress(Exception):  # object stores raise types of their own
                storage.write_json(self._url, state)

    def end(self) -> None:
        """Remove the file: there is nothing to follow any more."""
        with suppress(Exception):
            storage.remove(self._url)


def share_done(state: dict[str, Any] | None) -> float:
    """How much of the work is done, from 0 to 1, by `step` and `steps` of what was last written; 0 without."""
    return state["step"] / max(state["steps"], 1) if state and "steps" in state else 0.0


def read_pulse(url: str) -> dict[str, Any] | None:
    """What was last written to `url`, or None where there is nothing or storage does not answer: that is no news."""
    try:
        state = storage.read_json(url)
    except Exception:  # object stores raise types of their own
        return None
    return state if isinstance(state, dict) else None
