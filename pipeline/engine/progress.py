"""What a person sees while work goes on: a live display on a terminal, plain lines without one."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.text import rough_duration

#: Seconds between two lines where there is no terminal.
LINE_EVERY = 10.0

#: Seconds between two changes of a live display.
REFRESH_EVERY = 0.2

#: Seconds over which a rate is averaged.
RATE_WINDOW = 60

#: Units of work that their rate is taken over, at least: some take minutes.
FEWEST_UNITS = 10

#: A worker that committed nothing for so long is not counted in the rate per worker.
WORKER_SILENCE = 300.0


class Rate:
    """Events per second over the last `RATE_WINDOW` seconds, or over as long as `fewest` events take on average where
    that is more; over the time since the start while that is less."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, fewest: int = 0) -> None:
        self._clock = clock
        self._fewest = fewest
        self._start = clock()
        self._buckets: deque[tuple[int, int]] = deque()
        self._sum = 0
        self._all = 0
        self._first: tuple[float, float] | None = None

    def add(self, count: int) -> None:
        """Count `count` events now."""
        second = int(self._clock())
        if self._buckets and self._buckets[-1][0] == second:
            self._buckets[-1] = (second, self._buckets[-1][1] + count)
        else:
            self._buckets.append((second, count))
        self._sum += count
        self._all += count

    def per_second(self) -> float:
        """The present rate; 0 before anything was counted."""
        now = self._clock()
        elapsed = max(now - self._start, 1e-3)
        window = max(RATE_WINDOW, self._fewest * elapsed / max(self._all, 1))
        while self._buckets and self._buckets[0][0] < now - window:
            self._sum -= self._buckets.popleft()[1]
        return self._sum / min(elapsed, window) if self._sum else 0.0

    def mean(self, begun: float) -> float:
        """The rate since the first call of this (what went before was preparation), with the parts of events that are
        under way. 0 where nothing has moved since then."""
        now, all_of_them = self._clock(), self._all + begun
        if self._first is None:
            self._first = (now, all_of_them)
        since, were = self._first
        return max(all_of_them - were, 0.0) / max(now - since, 1e-3)


class Tally:
    """The numbers behind the display: units of work done and failed, pairs, rejected pairs, rates, time left."""

    def __init__(
        self, total: int, *, done: int = 0, pairs: int = 0, rejected: int = 0, clock: Callable[[], float] | None = None
    ) -> None:
        self._clock = clock or time.monotonic
        self.total = total
        self.done = done
        self.failed = 0
        self.pairs = pairs
        self.rejected = rejected
        #: Units in hand, by how much of each is done.
        self.begun = 0.0
        self._units = Rate(self._clock, fewest=FEWEST_UNITS)
        self._pairs = Rate(self._clock)
        self._workers: dict[str, tuple[Rate, float]] = {}

    def begin(self, done: int) -> None:
        """`done` units are there, and rates count from now on: what went before was preparation."""
        self.done += done
        self._units = Rate(self._clock, fewest=FEWEST_UNITS)

    def add(self, pairs: int = 0, rejected: int = 0, worker: str = "") -> None:
        """One unit is done, by `worker`."""
        self.done += 1
        self.pairs += pairs
        self.rejected += rejected
        self._units.add(1)
        self._pairs.add(pairs)
        if worker:
            rate = self._workers[worker][0] if worker in self._workers else Rate(self._clock)
            rate.add(pairs)
            self._workers[worker] = (rate, self._clock())

    def seconds_left(self) -> float | None:
        """Estimate from the present rate; None while there is none."""
        rate = self._units.mean(self.begun) if self.begun else self._units.per_second()
        return (self.total - self.done - self.failed - self.begun) / rate if rate else None

    def line(self, unit: str) -> str:
        """The numbers in one line, without the counts of done and total."""
        parts = []
        if self._pairs.per_second():
            parts.append(f"{self._pairs.per_second():,.0f} pairs/s{self._per_worker()}")
        elif rate := self._units.per_second():
            parts.append(
                f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{rough_duration(1 / rate)} per {unit.removesuffix('s')}"
            )
        if self.done + self.failed < self.total:
            left = self.seconds_left()
            parts.append(f"{rough_duration(left)} left" if left is not None else "time left unknown")
        if self.rejected:
            parts.append(f"{self.rejected:,} rejected")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)

    def _per_worker(self) -> str:
        now = self._clock()
        self._workers = {name: entry for name, entry in self._workers.items() if now - entry[1] < WORKER_SILENCE}
        rates = [rate.per_second() for rate, _ in self._workers.values()]
        if len(rates) < 2:
            return ""
        return f" ({len(rates)} workers, {min(rates):,.0f} to {max(rates):,.0f} each)"


def say(title: str, text: str, console: Console | None = None) -> None:
    """Print one line that begins with what it is about; on standard error unless a console is given."""
    console = console or Console(stderr=True)
    console.print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)


def can_repaint(console: Console) -> bool:
    """Whether what is shown there can be painted over: on a terminal that a person looks at.

    `FORCE_COLOR` makes rich take a file for a terminal, and the shell lines of a notebook have a terminal whose output
    is kept as it comes; both get colours, but plain lines.
    """
    return console.is_interactive and console.file.isatty() and "JPY_PARENT_PID" not in os.environ


class Display:
    """Shows a `Tally`; use as a context manager and call `tick` as often as convenient."""

    def __init__(self, title: str, unit: str, tally: Tally, console: Console | None = None) -> None:
        self.tally = tally
        self._title = title
        self._unit = unit
        self._console = console or Console(stderr=True)
        self._last_line = time.monotonic()
        self._last_refresh = 0.0
        self._live: Progress | None = None

    def __enter__(self) -> Display:
        if can_repaint(self._console):
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )
            self._live.start()
            self._live.add_task(self._title, total=self.tally.total, completed=self.tally.done, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._refresh(self._live)
            self._live.stop()
        else:
            self._print_line()

    def tick(self) -> None:
        """Refresh the display, or print a line when the last one is `LINE_EVERY` seconds old."""
        now = time.monotonic()
        if self._live is None and now - self._last_line >= LINE_EVERY:
            self._print_line()
        elif self._live is not None and now - self._last_refresh >= REFRESH_EVERY:
            self._last_refresh = now
            self._refresh(self._live)

    def note(self, text: str) -> None:
        """Print one line of its own, above a live display."""
        say(self._title, text, self._live.console if self._live else self._console)

    def _refresh(self, live: Progress) -> None:
        live.update(live.task_ids[0], completed=self.tally.done, detail=self.tally.line(self._unit))

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        line = self.tally.line(self._unit)
        self.note(f"{self.tally.done:,} of {self.tally.total:,} {self._unit}" + (f", {line}" if line else ""))
