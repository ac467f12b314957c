"""How long workers with shards in hand may be silent before they are taken to hang."""

from __future__ import annotations

#: Times the longest shard seen so far.
FACTOR = 20.0

#: Seconds at least: storage may be away for some minutes.
LEAST = 1800.0

#: Seconds while no shard has come back yet, so that nothing is known of how long one takes.
UNKNOWN = 6 * 3600.0


class Patience:
    """The limit on a worker's silence: the one given, else derived from the shards that came back.

    Args:
        given: seconds; None derives the limit.
    """

    def __init__(self, given: float | None) -> None:
        self._given = given
        self._longest = 0.0

    def saw(self, seconds: float) -> None:
        """A shard took `seconds` in its worker."""
        self._longest = max(self._longest, seconds)

    @property
    def seconds(self) -> float:
        """Seconds of silence after which a worker is taken to hang."""
        if self._given is not None:
            return self._given
        return max(LEAST, FACTOR * self._longest) if self._longest else UNKNOWN
