"""Which shard a worker gets next, and what becomes of a shard that fails or kills its worker. Plain Python, no Ray."""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.engine.outage import Outage

#: Failures and deaths in a row from which on a worker rests while others go on.
FRUITLESS = 3

#: Its first rest, in waits of a shard that raised; each further failure doubles it, so many times at most.
REST, DOUBLINGS = 10, 7

#: Machines that may go away under one task before it is held to be the cause.
LOST_NODES = 20


@dataclass
class _Lane:
    """What one worker has in hand, and the shards that were in hand when it died; its failures and deaths in a row."""

    in_hand: set[int] = field(default_factory=set)
    suspects: deque[int] = field(default_factory=deque)
    alone: bool = False
    fruitless: int = 0
    rests_until: float = 0.0
    committed: float = -math.inf


class ShardQueue:
    """Hands out shards, at most `depth` at a time per worker, so that a faster worker comes back for more.

    Towards the end nobody takes more than its share of what is left: a shard that waits on one worker while another
    has nothing to do would make the run longer.

    A shard that raises is given out again after `wait` seconds, doubled each time, up to `retries` times.

    When a worker dies with several shards in hand, any of them may have killed it. They become suspects: they go
    back to that same worker, one at a time with nothing else in hand, so that the next death has one cause. A shard
    whose worker dies `retries` times (at least once) with nothing else in hand is given up; other workers never
    meet it, unless that worker does not come back, or rests.

    A worker that fails and dies again and again while others go on is itself the cause, a broken GPU for one, and
    would fail shards faster than others score them. From `FRUITLESS` times in a row it rests, longer each time, and
    then gets one new shard at a time until it commits one. What it failed, and had when it died, goes to others.

    While storage is away (`pipeline.engine.outage`) every worker gets one shard at a time, and tries do not count.

    Attributes:
        depth: may become another one while work goes on.
    """

    def __init__(
        self,
        pending: Sequence[int],
        *,
        depth: int,
        retries: int,
        wait: float,
        longest_outage: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.depth = depth
        self._pending = pending
        self._cursor = 0
        self._open = 0  # shards taken from `pending` that are neither committed nor given up
        self._retries = retries
        self._wait = wait
        self._clock = clock
        self._outage = Outage(wait, longest_outage, clock)
        self._lanes: dict[str, _Lane] = {}
        self._delayed: list[tuple[float, int]] = []
        self._orphans: deque[int] = deque()
        self._failures: dict[int, int] = {}
        self._deaths: dict[int, int] = {}
        self._lost: dict[int, int] = {}

    def take(self, worker: str, workers: int = 1) -> int | None:
        """The next shard for `worker`, or None when it has enough in hand or nothing is due.

        `workers` is how many share the work, those that have not asked yet included.
        """
        lane = self._lanes.setdefault(worker, _Lane())
        share = -(-self.left() // max(workers, 1))
        depth = 1 if self.outage else self.depth
        if lane.alone or len(lane.in_hand) >= min(depth, share):
            return None
        doubted = self._is_doubted(lane)
        if doubted and (lane.in_hand or lane.rests_until > self._clock()):
            return None
        shard: int | None
        if lane.suspects or (self._orphans and not doubted):
            if lane.in_hand:
                return None
            shard = (lane.suspects or self._orphans).popleft()
            lane.alone = True
        else:
            shard = self._next(fresh=doubted)
        if shard is not None:
            lane.in_hand.add(shard)
        return shard

    def _next(self, fresh: bool) -> int | None:
        """What is due; with `fresh` only what was not tried yet."""
        if not fresh and self._delayed and self._delayed[0][0] <= self._clock():
            return heapq.heappop(self._delayed)[1]
        if self._cursor == len(self._pending):
            return None
        self._cursor += 1
        self._open += 1
        return self._pending[self._cursor - 1]

    def succeeded(self, worker: str, shard: int) -> None:
        """`worker` committed `shard`."""
        self._release(worker, shard)
        if (lane := self._lanes.get(worker)) is not None:
            lane.fruitless, lane.committed = 0, self._clock()
        self._outage.answered(shard)
        self._open -= 1
        self._failures.pop(shard, None)
        self._deaths.pop(shard, None)
        self._lost.pop(shard, None)

    def failed(self, worker: str, shard: int, *, no_answer: bool = False, node_lost: bool = False) -> bool:
        """`shard` raised an error on `worker`. True: it will be tried again; False: it is given up.

        `no_answer` says that storage did not answer (`pipeline.engine.outage.has_no_answer`), `node_lost` that the
        machine went away. Neither counts as a try, within limits.
        """
        self._release(worker, shard)
        if node_lost and self._lost.get(shard, 0) < LOST_NODES:
            self._lost[shard] = self._lost.get(shard, 0) + 1
            heapq.heappush(self._delayed, (self._clock() + self._wait, shard))
            return True
        if no_answer and (pause := self._outage.unanswered(shard)) is not None:
            heapq.heappush(self._delayed, (self._clock() + pause, shard))
            return True
        self._failed_again(worker)
        count = self._failures[shard] = self._failures.get(shard, 0) + 1
        if count > self._retries:
            self._open -= 1
            self._outage.settled(shard)
            return False
        heapq.heappush(self._delayed, (self._clock() + self._wait * 2 ** (count - 1), shard))
        return True

    def died(self, worker: str, *, blame: bool = True) -> int | None:
        """`worker` died. Returns the shard that is given up for it, if any.

        With `blame=False` (its node went away) no shard is held to have caused it.
        """
        lane = self._lanes.get(worker)
        if lane is None:
            return None
        in_hand = sorted(lane.in_hand)
        lane.in_hand.clear()
        lane.alone = False
        if blame:
            self._failed_again(worker)
        if blame and len(in_hand) == 1:
            count = self._deaths[in_hand[0]] = self._deaths.get(in_hand[0], 0) + 1
            if count >= max(self._retries, 1):
                self._open -= 1
                return in_hand[0]
        lane.suspects.extendleft(reversed(in_hand))
        if self.rest(worker):
            self.removed(worker)
        return None

    def _failed_again(self, worker: str) -> None:
        lane = self._lanes.setdefault(worker, _Lane())
        lane.fruitless += 1
        if lane.fruitless >= FRUITLESS:
            lane.rests_until = self._clock() + REST * self._wait * 2 ** min(lane.fruitless - FRUITLESS, DOUBLINGS)

    def _is_doubted(self, lane: _Lane) -> bool:
        """Whether it fails again and again while another, which has shards in hand or just had, does not."""
        lately = self._clock() - REST * self._wait
        return lane.fruitless >= FRUITLESS and any(
            not other.fruitless and (other.in_hand or other.committed > lately) for other in self._lanes.values()
        )

    @property
    def outage(self) -> float:
        """Seconds that storage has been away; 0 when it is not."""
        return self._outage.seconds

    def rest(self, worker: str) -> float:
        """Seconds that `worker` gets nothing for, as long as others go on."""
        lane = self._lanes.get(worker)
        return max(lane.rests_until - self._clock(), 0.0) if lane is not None and self._is_doubted(lane) else 0.0

    def removed(self, worker: str) -> None:
        """`worker` does not come back: what it had goes to whoever asks next, still one at a time."""
        lane = self._lanes.get(worker)
        if lane is not None:
            self._orphans.extend([*sorted(lane.in_hand), *lane.suspects])
            lane.in_hand.clear()
            lane.suspects.clear()
            lane.alone = False

    def attempts(self, shard: int) -> tuple[int, int]:
        """How often `shard` has raised, and how often its worker died with nothing else in hand."""
        return self._failures.get(shard, 0), self._deaths.get(shard, 0)

    def in_hand(self, worker: str) -> int:
        """Shards that `worker` has now."""
        lane = self._lanes.get(worker)
        return len(lane.in_hand) if lane is not None else 0

    def idle(self) -> bool:
        """Whether no worker has a shard in hand."""
        return not any(lane.in_hand for lane in self._lanes.values())

    def left(self) -> int:
        """Shards that are neither committed nor given up."""
        return self._open + len(self._pending) - self._cursor

    def finished(self) -> bool:
        """Whether every shard is committed or given up."""
        return self.left() == 0

    def _release(self, worker: str, shard: int) -> None:
        lane = self._lanes.get(worker)
        if lane is not None:
            lane.in_hand.discard(shard)
            lane.alone = False
