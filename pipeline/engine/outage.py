"""Whether storage is away: then no shard is to blame, and storage is asked less often. Plain Python, no Ray."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from pipeline.errors import StageError
from pipeline.text import rough_duration

#: Different items in a row that storage gave no answer for, from which on it counts as away.
AWAY = 3

#: Times the wait before the next try is doubled while it is.
DOUBLINGS = 6

#: What connections that fail are called in Python and by clients of object stores, which share no class.
_NO_ANSWER = {
    "TimeoutError",
    "ConnectionError",
    "ClientConnectionError",
    "ClientPayloadError",
    "HTTPClientError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
}
#: What a mount or a network says that is away.
_NUMBERS = {
    errno.EIO,
    errno.ESTALE,
    errno.EBUSY,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
}
#: Answers of a server that may be others later, below 500.
_LATER = (408, 429)


def has_no_answer(error: BaseException) -> bool:
    """Whether `error` is of storage that did not answer, or only that it cannot now: asking later may help."""
    links = list(_causes(error))
    statuses = [status for status in map(_status, links) if status is not None]
    if statuses:
        return statuses[0] >= 500 or statuses[0] in _LATER
    return any(
        getattr(link, "errno", None) in _NUMBERS or any(kind.__name__ in _NO_ANSWER for kind in type(link).__mro__)
        for link in links
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, botocore or gcsfs."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _integer(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return _integer(getattr(error, "code" if type(error).__name__ == "HttpError" else "status", None))


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


class Outage:
    """Follows what comes of the items of one stage, and says whether storage is away.

    It counts as away once `AWAY` different items in a row had no answer and none was committed meanwhile. Before the
    first is committed it never does: the address or the credentials may be wrong.

    Args:
        wait: seconds before an item that raised is tried again.
        longest: seconds of an outage that is waited for. An item that had no answer for twice as long is at fault
            itself: there may be several storages, one of which is gone for good.
        clock: seconds.
    """

    def __init__(self, wait: float, longest: float, clock: Callable[[], float]) -> None:
        self._wait = wait
        self._longest = longest
        self._clock = clock
        self._committed = False
        self._in_a_row: set[int] = set()
        self._began = 0.0
        self._first: dict[int, float] = {}
        self._tries: dict[int, int] = {}

    def answered(self, item: int) -> None:
        """An item was committed."""
        self._committed = True
        self._in_a_row.clear()
        self.settled(item)

    def settled(self, item: int) -> None:
        """An item will not be tried any more."""
        self._first.pop(item, None)
        self._tries.pop(item, None)

    def unanswered(self, item: int) -> float | None:
        """An item had no answer: seconds after which to ask again, or None when it is not storage that is away."""
        now = self._clock()
        first = self._first.setdefault(item, now)
        if not self._in_a_row:
            self._began = now
        self._in_a_row.add(item)
        if not self.seconds or now - first > 2 * self._longest:
            return None
        tries = self._tries[item] = self._tries.get(item, 0) + 1
        return self._wait * float(2 ** min(tries, DOUBLINGS))

    @property
    def seconds(self) -> float:
        """For how long storage has been away; 0 when it is not."""
        away = self._committed and len(self._in_a_row) >= AWAY
        return max(self._clock() - self._began, 1e-9) if away else 0.0


class OutageWatch:
    """The driver's side: tells the user of an outage, and ends the stage when one is too long.

    Args:
        stage: what the stage is called.
        longest: seconds of an outage that is waited for.
        say: shows a line.
    """

    def __init__(self, stage: str, longest: float, say: Callable[[str], None]) -> None:
        self._stage = stage
        self._longest = longest
        self._say = say
        self._failure = ""
        self._away = False

    def unanswered(self, failure: object) -> None:
        """The last error of storage that did not answer."""
        self._failure = str(failure)

    def look(self, seconds: float) -> None:
        """Storage has been away for `seconds`; 0: it is not. Raises `StageError` when that is too long."""
        if seconds > self._longest:
            raise StageError(
                f"{self._stage}: storage has not answered for {rough_duration(seconds)}: {self._failure}; nothing was "
                "given up for it, and the same command goes on from here"
            )
        if bool(seconds) != self._away:
            self._away = bool(seconds)
            self._say(
                f"storage does not answer, which is tried again for {rough_duration(self._longest)}: {self._failure}"
                if self._away
                else "storage answers again"
            )
