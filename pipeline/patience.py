"""How long workers with work in hand may be silent before they count as hung, and how Ray's tasks are killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

#: Times the longest silence seen so far.
FACTOR = 20.0

#: Seconds at least: storage may be away for some minutes.
LEAST = 1800.0

#: Seconds before the first news, when nothing is known of how long the work takes.
UNKNOWN = 6 * 3600.0


class Patience:
    """The limit on a silence: the one given, else one derived from the silences that ended well.

    Args:
        given: seconds; None derives the limit.
        least: seconds that a derived limit has at least.
        unknown: seconds of a derived limit before the first news.
    """

    def __init__(self, given: float | None, *, least: float = LEAST, unknown: float = UNKNOWN) -> None:
        self._given = given
        self._least = least
        self._unknown = unknown
        self._longest = 0.0

    @staticmethod
    def of_computing(given: float | None) -> Patience:
        """For tasks that compute for long between two signs of life, and of which there may be one alone."""
        return Patience(given, least=UNKNOWN, unknown=4 * UNKNOWN)

    def saw(self, seconds: float) -> None:
        """News came after `seconds`."""
        self._longest = max(self._longest, seconds)

    @property
    def seconds(self) -> float:
        """Seconds of silence after which a worker with work in hand counts as hung."""
        if self._given is not None:
            return self._given
        return max(self._least, FACTOR * self._longest) if self._longest else self._unknown


class Silence:
    """For how long there has been no news of work in hand, and whether that is too long.

    Args:
        patience: sets the limit, and learns from the silences that news ended.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.begins()

    @property
    def seconds(self) -> float:
        """Seconds without news."""
        return time.monotonic() - self._since

    def begins(self) -> None:
        """Count from now on: work was handed out where there was none, or some came back."""
        self._since = time.monotonic()

    def news(self) -> None:
        """The work goes on."""
        self.patience.saw(self.seconds)
        self.begins()

    def is_too_long(self) -> bool:
        """Whether those who have work in hand count as hung."""
        return self.seconds > self.patience.seconds


def kill(tasks: Iterable[Any]) -> None:
    """Kill the Ray tasks of these references that have not ended.

    To cancel one that just has can abort the driver (Ray 2.60: `Check failed: it != submissible_tasks_.end()`).
    """
    import ray

    for task in tasks:
        _, running = ray.wait([task], timeout=0)
        if running:
            ray.cancel(task, force=True)


@contextmanager
def killed_by_errors(tasks: Callable[[], Iterable[Any]]) -> Iterator[None]:
    """Kill these Ray tasks when an error leaves the block: once the stage has failed, nothing is written any more."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the cluster may be gone; what went wrong first is what counts
            kill(tasks())
        raise
