"""Independent tasks over Ray: bounded in flight, retried with back-off, resumable, failures kept as files."""

from __future__ import annotations

import math
import queue
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, RayTaskError

from pipeline.config import EngineConfig
from pipeline.engine.connect import alive_nodes
from pipeline.engine.failures import Aside, Failure, check_writable, set_aside
from pipeline.engine.futures import tell
from pipeline.engine.interrupt import Interruption
from pipeline.engine.notes import Said, keep_notes, take_notes
from pipeline.engine.outage import OutageWatch
from pipeline.engine.progress import Display, Tally
from pipeline.engine.shard_queue import LOST_NODES, ShardQueue
from pipeline.errors import DiffpruneError, StageError
from pipeline.patience import Patience, Silence, kill, killed_by_errors
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.store.task_marks import TaskMarks
from pipeline.text import rough_duration

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Tasks in flight per task that can run at the same time: enough that no CPU waits for the driver.
IN_FLIGHT_PER_CPU = 2

#: Seconds that the driver waits for news before it looks around.
TICK = 0.2

#: Seconds between two looks for a sign of life of the tasks in hand, and at the cluster for room for more of them.
LOOK_EVERY = 5.0

_LANE = "tasks"


@dataclass
class TaskOutcome:
    """How a list of tasks ended: how many are complete (earlier ones included), and those set aside."""

    total: int
    done: int = 0
    failed: list[Aside] = field(default_factory=list)

    def check(self, stage: str) -> None:
        """Raise `StageError` with the list when a task failed."""
        if self.failed:
            named = "; ".join(str(aside) for aside in self.failed[:5])
            more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
            raise StageError(f"{stage}: {len(self.failed)} of {self.total} failed: {named}{more}")


def run_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    run: RunFolder,
    stage: str,
    config: EngineConfig,
    on_result: Callable[[int, Result], None],
    name: Callable[[Item], str] = str,
    marks: TaskMarks | None = None,
    unit: str = "tasks",
    gpus: float = 0,
    patience: Patience | None = None,
    pulse: Callable[[Item], object] | None = None,
    begun: Callable[[Any], float] | None = None,
) -> TaskOutcome:
    """Run `function(item)` for every item in Ray tasks.

    A task writes its mark itself, right after its result is known, so that a driver killed in between loses nothing; a
    mark of other settings it removes before it begins.

    A task that raises, or whose process dies, is tried again after `config.retry_wait` seconds, doubled each time,
    `config.retries` times, then set aside in `failed/STAGE/NNNNN.json`. It is tried anew by the next call. A machine
    that goes away costs no try, nor does storage that does.

    Args:
        function: picklable; named functions travel by name.
        items: each of them picklable.
        run: where the files of failed tasks go.
        stage: what tasks and their display are called.
        config: retries.
        on_result: called in the driver with the number and the result of each item, in no particular order; first with
            those that `marks` has from an earlier call, for which nothing is run.
        name: how an item is called in messages.
        marks: of tasks that are done; without them nothing is known of earlier calls.
        unit: what the display counts, in the plural.
        gpus: GPUs of one task, which has one CPU.
        patience: after how long without news the tasks in hand count as hung: they are killed, and have failed. News
            is a task that came back, or a `pulse` that changed. None waits for ever.
        pulse: called in the driver; something about an item in hand that changes while its task goes on.
        begun: what a `pulse` says of how much of its item is done, from 0 to 1, for the time that is left.

    Raises `StageError` when the run folder cannot be written or the run is interrupted.
    """
    check_writable(run.root)
    outcome = TaskOutcome(total=len(items))
    settled = bytearray(len(items))
    for number, result in marks.finished(len(items)) if marks is not None else ():
        settled[number] = 1
        outcome.done += 1
        on_result(number, result)
    pending = array("q", (number for number, value in enumerate(settled) if not value))
    waiting = ShardQueue(
        pending,
        depth=_in_flight(gpus),
        retries=config.retries,
        wait=config.retry_wait,
        longest_outage=config.storage_timeout,
    )
    # Retries are counted here, not by Ray, so that exceptions and dead processes share one limit and one back-off.
    remote = ray.remote(_call).options(
        num_cpus=1, num_gpus=gpus, max_retries=0, name=stage, scheduling_strategy="SPREAD"
    )
    function_ref = ray.put(function)
    tally = Tally(len(items), done=outcome.done)
    silence = Silence(patience or Patience(math.inf))
    in_hand = _InHand(items, silence, _Pulses(pulse, silence, begun, tally) if pulse is not None else None)
    with (
        Display(stage, unit, tally) as display,
        Interruption(lambda: display.note("finishing what is in hand (again: stop at once)")) as stop,
        killed_by_errors(in_hand.refs),
    ):
        notes = Said(display.note)
        outage = OutageWatch(stage, config.storage_timeout, display.note)
        looked = time.monotonic()
        while not waiting.finished():
            if time.monotonic() - looked > LOOK_EVERY:
                looked = time.monotonic()
                waiting.depth = _in_flight(gpus)
            if stop.requested and waiting.idle():
                left = outcome.total - outcome.done - len(outcome.failed)
                raise StageError(
                    f"{stage}: interrupted, {left} of {outcome.total} {unit} left; the same command goes on"
                )
            while not stop.requested and (due := waiting.take(_LANE)) is not None:
                in_hand.add(due, remote.remote(function_ref, items[due], due, marks))
            outage.look(waiting.outage)
            display.tick()
            try:
                number, answer = in_hand.news.get(timeout=TICK)
            except queue.Empty:
                if (limit := in_hand.kill_hanging()) is not None:
                    display.note(f"no news for {rough_duration(limit)}: killing {len(in_hand)} {unit} in progress")
                continue
            found = in_hand.came_back(number, answer)
            if isinstance(found, _Done):
                waiting.succeeded(_LANE, number)
                outcome.done += 1
                tally.add()
                notes.hear(found.notes)
                on_result(number, found.value)
                continue
            if found.no_answer:
                outage.unanswered(found)
            lost = isinstance(answer, NodeDiedError)
            if not waiting.failed(_LANE, number, no_answer=found.no_answer, node_lost=lost):
                attempts, _ = waiting.attempts(number)
                aside = Aside(number, name(items[number]), found, attempts)
                set_aside(storage.join(run.root, "failed", stage, f"{number:05d}.json"), aside)
                outcome.failed.append(aside)
                tally.failed += 1
                display.note(f"set aside {aside}")
    _forget_old_failures(run, stage, outcome)
    return outcome


def run_task(
    function: Callable[[Item], Result],
    item: Item,
    *,
    stage: str,
    config: EngineConfig,
    patience: Patience | None = None,
) -> Result:
    """`function(item)` in one Ray task: for work that needs more memory or imports than the driver shall have.

    A task whose process dies is tried again `config.retries` times; so is one that has not come back after `patience`,
    when it is killed. A machine that goes away costs no try. None waits for ever, and none goes on when the wait for it
    is interrupted. Raises what the function raised, or `StageError` when its process died or hung too often.
    """
    # Deaths are counted here, not by Ray, which may start a task again that was killed because it hung.
    task = ray.remote(_apply).options(max_retries=0, name=stage)
    limit = patience.seconds if patience is not None else None
    lost, tries, machines = "", 0, 0
    while tries <= config.retries and machines <= LOST_NODES:
        ref = task.remote(function, item)
        try:
            result: Result = ray.get(ref, timeout=limit)
        except GetTimeoutError:
            kill([ref])
            tries += 1
            lost = f"hung: it had not come back after {limit:.0f} s and was killed (storage, or a deadlock)"
        except RayTaskError as error:
            if isinstance(error.cause, DiffpruneError | OSError):
                raise error.cause from None
            raise
        except NodeDiedError as error:
            machines += 1
            lost = f"lost its machine {machines} times: {' '.join(str(error).split())[:300]}"
        except RayError as error:
            tries += 1
            lost = f"lost its process: {' '.join(str(error).split())[:300]}"
        except BaseException:
            kill([ref])
            raise
        else:
            return result
    raise StageError(f"{stage}: {lost}")


def _apply(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


class _Pulses:
    """What tasks in hand say of themselves while they go on; another value is news."""

    def __init__(
        self,
        pulse: Callable[[Any], object],
        silence: Silence,
        begun: Callable[[Any], float] | None,
        tally: Tally,
    ) -> None:
        self._pulse = pulse
        self._silence = silence
        self._begun = begun
        self._tally = tally
        self._found: dict[int, object] = {}
        self._looked = time.monotonic()

    def look(self, in_hand: dict[int, Any]) -> None:
        """Ask the items in hand, every `LOOK_EVERY` seconds."""
        now = time.monotonic()
        if now - self._looked <= LOOK_EVERY:
            return
        self._looked = now
        before, self._found = self._found, {number: self._pulse(item) for number, item in in_hand.items()}
        if any(before.get(number, value) != value for number, value in self._found.items()):
            self._silence.news()
        self._count()

    def ended(self, number: int) -> None:
        """An item is not in hand any more."""
        self._found.pop(number, None)
        self._count()

    def _count(self) -> None:
        if self._begun is not None:
            self._tally.begun = sum(map(self._begun, self._found.values()))


class _InHand:
    """The tasks that Ray has, which are killed when nothing is heard of them for too long.

    Args:
        items: all of them, known by number.
        silence: since when nothing was heard, and whether that is too long.
        pulses: what tasks say of themselves while they go on.
    """

    def __init__(self, items: Sequence[Any], silence: Silence, pulses: _Pulses | None) -> None:
        self.news: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._items = items
        self._silence = silence
        self._pulses = pulses
        self._tasks: dict[int, tuple[Any, float]] = {}  # Ray's reference, and since when
        self._killed: dict[int, Failure] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, number: int, ref: Any) -> None:
        """Ray has this task now; what comes of it will be in `news`."""
        if not self._tasks:
            self._silence.begins()
        self._tasks[number] = (ref, time.monotonic())
        tell(self.news.put, ref, number)

    def came_back(self, number: int, answer: Any) -> _Done | Failure:
        """What these news of a task say."""
        _, since = self._tasks.pop(number)
        if self._pulses is not None:
            self._pulses.ended(number)
        hung = self._killed.pop(number, None)
        waited = time.monotonic() - since if self._pulses is None else self._silence.seconds
        self._silence.begins()
        if isinstance(answer, _Done):
            self._silence.patience.saw(waited)
            return answer
        return answer if isinstance(answer, Failure) else hung or Failure.of(answer)

    def kill_hanging(self) -> float | None:
        """Kill all when they have been silent for too long; the limit, in seconds, if so."""
        if self._tasks and self._pulses is not None:
            self._pulses.look({number: self._items[number] for number in self._tasks})
        if not (self._tasks and self._silence.is_too_long()):
            return None
        limit = self._silence.patience.seconds
        why = f"no news for {limit:.0f} s: killed (storage, or a deadlock)"
        self._killed.update(dict.fromkeys(self._tasks, Failure("TaskHung", why)))
        self._silence.begins()
        kill(self.refs())
        return limit

    def refs(self) -> Iterator[Any]:
        """Ray's reference of each."""
        return (ref for ref, _ in self._tasks.values())


@dataclass(frozen=True)
class _Done:
    value: Any
    notes: tuple[str, ...] = ()


def _call(function: Callable[[Any], Any], item: Any, number: int, marks: TaskMarks | None) -> _Done | Failure:
    """Runs in the task: an exception comes back as a value, since it may not survive pickling."""
    keep_notes()
    try:
        if marks is not None:
            marks.invalidate(number)
        result = function(item)
        if marks is not None:
            marks.write(number, result)
    except Exception as error:
        return Failure.of(error)
    return _Done(result, take_notes())


def _in_flight(gpus: float) -> int:
    """Tasks handed to Ray at a time: a small multiple of those that can run at once.

    Those that find no room are what an autoscaler adds machines for.
    """
    nodes = alive_nodes()
    resource, share = ("GPU", gpus) if gpus else ("CPU", 1)
    at_once = sum(node.get(resource, 0.0) for node in nodes) / max(share, 0.01)
    return max(2, int(at_once * IN_FLIGHT_PER_CPU))


def _forget_old_failures(run: RunFolder, stage: str, outcome: TaskOutcome) -> None:
    """Remove the files of failures that an earlier call left and this one overcame."""
    still = {aside.item for aside in outcome.failed}
    for url in storage.list_files(storage.join(run.root, "failed", stage), ".json"):
        if int(storage.basename(url).removesuffix(".json")) not in still:
            storage.remove(url)
