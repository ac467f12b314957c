"""The driver of scoring: hands shards to actors, keeps them fed, and sees every shard committed or set aside."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from pipeline.config import EngineConfig
from pipeline.data.inventory import ShardInfo
from pipeline.engine.connect import alive_nodes, cluster_address, node_is_alive
from pipeline.engine.failures import Aside, Failure, check_writable, set_aside
from pipeline.engine.futures import tell
from pipeline.engine.interrupt import Interruption
from pipeline.engine.metrics import DriverMetrics
from pipeline.engine.notes import Said
from pipeline.engine.outage import OutageWatch
from pipeline.engine.outcome import Outcome, pending_shards, rejected
from pipeline.engine.progress import Display, Tally
from pipeline.engine.resources import plan_workers
from pipeline.engine.shard_queue import ShardQueue
from pipeline.engine.worker import Place, ScoreWorker, ShardStats, WorkerSpec
from pipeline.errors import NoWorkerError, StageError
from pipeline.patience import Patience
from pipeline.run import RunFolder
from pipeline.store import commits
from pipeline.store.fingerprint import Fingerprint
from pipeline.text import plural, rough_duration

#: Times Ray restarts one actor by itself; after that the driver makes a new one.
ACTOR_RESTARTS = 10

#: Seconds between two looks at the cluster for machines that joined or left.
LOOK_EVERY = 5.0

#: Seconds after which the shards of a worker that does not come back go to others.
GONE_AFTER = 30.0

#: Seconds that the driver waits for news before it looks around.
TICK = 0.2

#: Workers whose news are taken in before they are fed again.
EVENTS_AT_ONCE = 100


def score_shards(
    spec: WorkerSpec,
    shards: Sequence[ShardInfo],
    run: RunFolder,
    fingerprint: Fingerprint,
    config: EngineConfig,
    *,
    retry_failed: bool = False,
    title: str = "score",
) -> Outcome:
    """Score every shard that is not yet committed with this fingerprint.

    Args:
        spec: makes the work of an actor; goes to each of them.
        shards: the inventory.
        run: where results, marks and the files of failed shards go.
        fingerprint: the run's, without a shard.
        config: workers, retries, and what happens to stale results.
        retry_failed: take up the shards again that an earlier call set aside.
        title: what the display calls the work.

    Raises `FingerprintError` for results of other settings with `stale: refuse`; `StageError` when the run folder
    cannot be written, no worker can start, or the run is interrupted. Failed shards are in the outcome, not raised.
    """
    start = time.monotonic()
    check_writable(run.root)
    outcome = Outcome(total=len(shards))
    pending = pending_shards(shards, run, fingerprint, config, outcome, retry_failed)
    tally = Tally(len(shards), done=outcome.done, pairs=outcome.statuses.total(), rejected=rejected(outcome.statuses))
    tally.failed = len(outcome.failed)
    with Display(title, "shards", tally) as display:
        if pending:
            _Driver(spec, shards, run, fingerprint, config, outcome, display).work(pending)
    outcome.seconds = time.monotonic() - start
    return outcome


@dataclass
class _Slot:
    """One actor, or the wish for one. `life` counts its deaths, so that late news of an earlier life is ignored.

    `place` is None while the cluster has no room for it. `heard` is when it last had news, or got work after it had
    none; `hung` how often in a row it did not come back from its start.
    """

    handle: Any
    ready: bool = False
    place: Place | None = None
    life: int = 0
    hung: int = 0
    waiting_since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)


#: In place of where an actor was that had no place.
_NOWHERE = Place("", "")

#: In place of a shard's: of the call that lasts as long as the actor's process.
_ALIVE = -1

#: News of an actor: slot, its life, place of the shard (None: of its start; `_ALIVE`), and what came back.
_Event = tuple[str, int, int | None, Any]


class _Driver:
    """One call of `score_shards`: the loop that reacts to what the actors report."""

    def __init__(
        self,
        spec: WorkerSpec,
        shards: Sequence[ShardInfo],
        run: RunFolder,
        fingerprint: Fingerprint,
        config: EngineConfig,
        outcome: Outcome,
        display: Display,
    ) -> None:
        self._spec = spec
        self._shards = shards
        self._run = run
        self._fingerprint = fingerprint
        self._config = config
        self._outcome = outcome
        self._display = display
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._slots: dict[str, _Slot] = {}
        self._made = 0
        self._fruitless = 0  # actors in a row that could not start
        self._looked = self._fed = 0.0
        self._last_ready = time.monotonic()
        self._metrics = DriverMetrics()
        self._notes = Said(display.note)
        self._patience = Patience(config.shard_timeout)

    def work(self, pending: Sequence[int]) -> None:
        """Until every pending shard is settled."""
        config = self._config
        self._queue = ShardQueue(
            pending,
            depth=config.prefetch + 2,
            retries=config.retries,
            wait=config.retry_wait,
            longest_outage=config.storage_timeout,
        )
        self._outage = OutageWatch("score", config.storage_timeout, self._display.note)
        try:
            with Interruption(lambda: self._display.note("finishing what is in hand (again: stop at once)")) as stop:
                while not self._queue.finished():
                    if stop.requested and self._queue.idle():
                        left = self._outcome.total - self._outcome.done - len(self._outcome.failed)
                        raise StageError(
                            f"score: interrupted, {left} of {self._outcome.total} shards left; the same command goes "
                            "on from here"
                        )
                    self._look_around()
                    self._react(feed=not stop.requested)
                    self._outage.look(self._queue.outage)
                    self._display.tick()
        except BaseException:
            for slot in self._slots.values():
                with suppress(Exception):  # the cluster may be gone; what went wrong first is what counts
                    ray.kill(slot.handle)
            raise
        else:
            for slot in self._slots.values():
                if slot.ready:
                    with suppress(Exception):  # all is committed: whatever a worker has now costs nothing
                        slot.handle.leave.remote()
        finally:
            self._slots.clear()  # without a handle an actor ends by itself, and reports its last metrics

    def _react(self, feed: bool) -> None:
        """Wait for news, take in all there is, and give work to the workers that reported."""
        hungry: set[str] = set()
        with suppress(queue.Empty):
            event = self._events.get(timeout=TICK)
            while len(hungry) < EVENTS_AT_ONCE:
                hungry.add(event[0])
                self._handle(*event)
                event = self._events.get_nowait()
        now = time.monotonic()
        if now - self._fed >= TICK:  # a retry may be due, and its worker silent
            self._fed = now
            hungry.update(self._slots)
        if feed:
            for name in hungry:
                self._feed(name)

    def _handle(self, name: str, life: int, place: int | None, result: Any) -> None:
        slot = self._slots.get(name)
        if slot is None or slot.life != life:
            return
        slot.heard = time.monotonic()
        if isinstance(result, RayActorError):
            self._died(name, slot, place, result)
        elif place is None:
            self._started(name, slot, result)
        elif place == _ALIVE:
            pass  # it was asked to leave
        elif isinstance(result, ShardStats):
            self._queue.succeeded(name, place)
            self._patience.saw(sum(result.seconds.values()))
            self._notes.hear(result.notes)
            self._outcome.done += 1
            self._outcome.statuses.update(result.statuses)
            self._display.tally.add(result.pairs, rejected(result.statuses), name)
        else:
            failure = result if isinstance(result, Failure) else Failure.of(result, name)
            if failure.no_answer:
                self._outage.unanswered(failure)
            if not self._queue.failed(name, place, no_answer=failure.no_answer):
                self._give_up(place, failure)
            self._note_rest(name)

    def _started(self, name: str, slot: _Slot, result: Any) -> None:
        if isinstance(result, Place):
            slot.place = result
            # Repeated here, not by Ray: a death means that a new place must be waited for.
            self._listen(slot.handle.start.options(max_task_retries=0).remote(), name, slot.life, None)
        elif result is None:
            slot.ready, slot.hung = True, 0
            self._fruitless = 0
            self._listen(slot.handle.stay.options(max_task_retries=0).remote(), name, slot.life, _ALIVE)
        else:
            self._drop(name, result if isinstance(result, Failure) else Failure.of(result, name))

    def _died(self, name: str, slot: _Slot, place: int | None, error: RayActorError) -> None:
        """An actor's process is gone: find out what to do with its shards, and have it started again."""
        self._metrics.worker_died()
        slot.life += 1
        if place is None and isinstance(error, ActorDiedError):
            self._drop(name, Failure.of(error, name))
            return
        why = "the worker's process died each time it had this shard (out of memory, a GPU's error, or a native crash)"
        at = slot.place or _NOWHERE
        failure = Failure("WorkerDied", why, str(error)[-1000:], node=at.host, worker=name)
        self._lost(name, failure, blame=node_is_alive(at.node_id))
        if isinstance(error, ActorDiedError):
            slot.handle = self._actor(name)
        self._start(name, slot)

    def _lost(self, name: str, failure: Failure, *, blame: bool) -> None:
        """What a worker had in hand goes back to it, but for a shard that cost it its process too often."""
        given_up = self._queue.died(name, blame=blame)
        if given_up is not None:
            self._give_up(given_up, failure)
        self._note_rest(name)

    def _note_rest(self, name: str) -> None:
        if rest := self._queue.rest(name):
            self._display.note(f"worker {name} fails while others go on: it gets no shard for {rough_duration(rest)}")

    def _replace_hanging(self) -> None:
        """Kill workers that were silent for too long, with shards in hand or at their start, and start others."""
        now = time.monotonic()
        for name, slot in list(self._slots.items()):
            if slot.place is None or (slot.ready and not self._queue.in_hand(name)):
                continue
            silent, limit = now - slot.heard, self._patience.seconds if slot.ready else self._config.start_timeout
            if silent <= limit:
                continue
            doing = "" if slot.ready else " at its start"
            self._display.note(
                f"worker {name} on {slot.place.host} was silent for {rough_duration(silent)}{doing} and is killed"
            )
            self._metrics.worker_died()
            slot.life += 1
            ray.kill(slot.handle)
            why = f"the worker hung each time it had this shard: silent for {silent:.0f} s (storage, or a deadlock)"
            if not slot.ready:
                slot.hung += 1
                why = f"the worker hung at its start: nothing loaded after {silent:.0f} s (storage, or a deadlock)"
            failure = Failure("WorkerHung", why, node=slot.place.host, worker=name)
            self._lost(name, failure, blame=slot.ready)
            if slot.hung > self._config.retries:
                self._drop(name, failure)
                continue
            slot.handle = self._actor(name)
            self._start(name, slot)

    def _drop(self, name: str, failure: Failure) -> None:
        """An actor could not start: do without it, unless no other is left."""
        self._fruitless += 1
        self._display.note(f"worker {name} cannot start: {failure}")
        del self._slots[name]
        self._queue.removed(name)
        if self._fruitless >= self._wanted and not any(slot.ready for slot in self._slots.values()):
            raise NoWorkerError(f"score: no worker can start: {failure}")

    def _give_up(self, place: int, failure: Failure) -> None:
        shard = self._shards[place]
        raised, deaths = self._queue.attempts(place)
        digest = commits.shard_fingerprint(self._fingerprint, shard).digest
        aside = Aside(shard.index, shard.url, failure, raised + deaths, deaths, digest)
        set_aside(self._run.failure_file(shard.index), aside)
        self._outcome.failed.append(aside)
        self._display.tally.failed += 1
        self._display.note(f"set aside {aside}")
        self._metrics.shard_failed()

    def _look_around(self) -> None:
        """Every few seconds: kill what hangs, ask for the actors that are planned, free the shards of lost workers.

        Actors that there is no room for yet are pending, which is what an autoscaler goes by.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        self._replace_hanging()
        self._plan = plan_workers(self._config, alive_nodes(), may_grow=cluster_address(self._config) is not None)
        self._wanted = min(self._plan.workers, self._queue.left())
        while len(self._slots) < self._wanted and self._fruitless < self._wanted:
            name = str(self._made)
            self._made += 1
            self._slots[name] = slot = _Slot(self._actor(name))
            self._start(name, slot)
        if any(slot.ready for slot in self._slots.values()):
            self._last_ready = now
            for name, slot in self._slots.items():
                if not slot.ready and now - slot.waiting_since > GONE_AFTER:
                    self._queue.removed(name)
        elif now - self._last_ready > GONE_AFTER:
            self._last_ready = now
            self._display.note(self._why_none_is_ready())

    def _why_none_is_ready(self) -> str:
        places = [slot.place.host for slot in self._slots.values() if slot.place is not None]
        if places:
            return f"no worker is ready yet; {len(places)} of {self._wanted} load what they need, one on {places[0]}"
        asked = ", ".join(f"{key}={value:g}" for key, value in self._plan.options().items() if value)
        return f"no room yet for {plural(self._wanted, 'worker')} with {asked} each: the cluster is asked for it"

    def _actor(self, name: str) -> Any:
        return (
            ray.remote(ScoreWorker)
            .options(
                name=f"score-worker-{name}-{time.time_ns():x}",
                max_restarts=ACTOR_RESTARTS,
                max_task_retries=-1,
                max_concurrency=self._config.prefetch + 3,
                scheduling_strategy="SPREAD",
                **self._plan.options(),
            )
            .remote(name, self._spec, self._config.prefetch)
        )

    def _start(self, name: str, slot: _Slot) -> None:
        """Wait until the actor has a place; Ray repeats the call through the actor's restarts. Then it is started."""
        slot.ready, slot.place = False, None
        slot.waiting_since = time.monotonic()
        self._listen(slot.handle.place.remote(), name, slot.life, None)

    def _feed(self, name: str) -> None:
        slot = self._slots.get(name)
        while slot is not None and slot.ready and (place := self._queue.take(name, self._wanted)) is not None:
            if self._queue.in_hand(name) == 1:
                slot.heard = time.monotonic()
            # No retries by Ray: it would run a shard that kills its worker again and again. The queue counts.
            call = slot.handle.score_shard.options(max_task_retries=0)
            self._listen(call.remote(self._shards[place]), name, slot.life, place)

    def _listen(self, ref: Any, name: str, life: int, place: int | None) -> None:
        tell(self._events.put, ref, name, life, place)
