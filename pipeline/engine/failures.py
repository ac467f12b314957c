"""Why a unit of work failed: what it raised, where, at which sample; and the files that keep it."""

from __future__ import annotations

import socket
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.engine.outage import has_no_answer
from pipeline.errors import StageError
from pipeline.store import storage

#: Characters of a traceback that are kept: its end, where the cause is.
TRACEBACK_CHARACTERS = 4000


class SampleError(Exception):
    """Raised by the work on a shard to say at which sample it failed; the reason is its `__cause__`."""

    def __init__(self, sample: str) -> None:
        super().__init__(sample)
        self.sample = sample


@dataclass(frozen=True)
class Failure:
    """One failed attempt, as plain values that travel between processes.

    `no_answer`: storage did not answer, so that the same may succeed later.
    """

    exception: str
    message: str
    traceback: str = ""
    last_sample: str = ""
    node: str = ""
    worker: str = ""
    no_answer: bool = False

    @staticmethod
    def of(error: BaseException, worker: str = "") -> Failure:
        """Describe `error`, raised in this process."""
        sample = ""
        text = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
        if isinstance(error, SampleError):
            sample = error.sample
            error = error.__cause__ or error
        return Failure(
            type(error).__name__, _one_line(error), text, sample, socket.gethostname(), worker, has_no_answer(error)
        )

    def __str__(self) -> str:
        place = f" (sample {self.last_sample})" if self.last_sample else ""
        return f"{self.exception}: {self.message}{place}"


@dataclass(frozen=True)
class Aside:
    """A unit of work that is given up: the content of its file."""

    item: int
    name: str
    failure: Failure
    attempts: int
    worker_deaths: int = 0
    fingerprint: str = ""
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        return f"{self.name}: {self.failure}"


def set_aside(url: str, aside: Aside) -> None:
    """Write the file that says why. Raises `StageError` when the run folder cannot be written."""
    try:
        storage.write_json(url, asdict(aside))
    except Exception as error:  # object stores raise types of their own
        raise StageError(f"{url}: cannot be written: {_one_line(error)}; {aside} is lost for this run") from error


def read_aside(url: str) -> Aside | None:
    """What `set_aside` wrote, or None where there is no such file."""
    try:
        value: dict[str, Any] = storage.read_json(url)
    except (FileNotFoundError, ValueError):
        return None
    return Aside(**{**value, "failure": Failure(**value["failure"])})


def check_writable(folder: str) -> None:
    """Before any work: raise `StageError` in one line when nothing can be written below `folder`.

    What a driver that was killed right here leaves has the same name for the next one, which removes it.
    """
    probe = storage.join(folder, f"{storage.TEMPORARY_PREFIX}probe")
    try:
        storage.write_bytes(probe, b"probe")
        storage.remove(probe)
    except Exception as error:  # object stores raise types of their own (no credentials, no bucket)
        raise StageError(f"{folder}: expected a folder that can be written to, found: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
