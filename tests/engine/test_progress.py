"""The numbers behind the display and its two forms."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.engine import progress
from pipeline.engine.progress import Display, Tally
from pipeline.text import rough_duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_and_time_left_follow_the_last_minute() -> None:
    clock = Clock()
    tally = Tally(100, clock=clock)
    assert tally.seconds_left() is None
    for _ in range(20):
        clock.now += 1
        tally.add(pairs=50, rejected=1, worker="0")
    assert tally.seconds_left() == pytest.approx(80)
    assert tally.line("shards") == "50 pairs/s, 1 min left, 20 rejected"
    clock.now += 30
    tally.add(pairs=500, worker="1")
    tally.failed += 1
    assert tally.line("shards").startswith("30 pairs/s (2 workers, ")
    assert tally.line("shards").endswith("20 rejected, 1 failed")
    clock.now += 200
    assert tally.seconds_left() is None


def test_earlier_work_counts_as_done_but_not_towards_the_rate() -> None:
    clock = Clock()
    tally = Tally(10, done=5, pairs=500, clock=clock)
    clock.now = 10
    tally.add(pairs=100)
    assert (tally.done, tally.pairs) == (6, 600)
    assert tally.line("shards") == "10 pairs/s, 40 s left"


def test_preparation_does_not_count_towards_the_rate() -> None:
    clock = Clock()
    tally = Tally(100, clock=clock)
    clock.now = 60
    tally.begin(2)
    assert (tally.done, tally.line("steps")) == (2, "time left unknown")
    for _ in range(20):
        clock.now += 0.5
        tally.add()
    assert tally.line("steps") == "2.0 steps/s, 39 s left"


def test_slow_units_are_averaged_since_the_start() -> None:
    clock = Clock()
    tally = Tally(6, clock=clock)
    assert tally.line("trainings") == "time left unknown"
    for now in (100, 200, 300):
        clock.now = now
        tally.add()
    clock.now = 400
    assert tally.line("trainings") == "2 min per training, 7 min left"


def test_units_in_hand_count_by_how_much_of_them_is_done() -> None:
    clock = Clock()
    tally = Tally(3, clock=clock)
    clock.now = 60  # of preparation
    tally.begun = 0.1
    assert tally.line("seeds") == "time left unknown"
    clock.now = 100
    tally.begun = 0.5
    assert tally.line("seeds") == "4 min left"
    clock.now = 160
    tally.add()
    tally.begun = 0.1
    assert tally.seconds_left() == pytest.approx(190)
    tally.begun = 0.0
    assert tally.line("seeds") == "3 min per seed, 5 min left"


def test_without_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    out = io.StringIO()
    tally = Tally(4)
    with Display("score", "shards", tally, Console(file=out, width=200)) as display:
        tally.add(pairs=10)
        display.tick()
        display.note("set aside [x]")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("score: 1 of 4 shards, ")
    assert lines[1] == "score: set aside [x]"
    assert "\x1b" not in out.getvalue()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "environment", "repainted"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"FORCE_COLOR": "1", "JPY_PARENT_PID": "1"}, False),  # a shell line of a notebook
        (io.StringIO(), {"FORCE_COLOR": "1"}, False),
    ],
    ids=["terminal", "dumb-terminal", "notebook", "file-with-colours"],
)
def test_a_bar_only_where_it_can_be_painted_over(
    out: io.StringIO, environment: dict[str, str], repainted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    console = Console(file=out, width=120)
    assert console.is_terminal is (out.isatty() or "FORCE_COLOR" in environment)
    with Display("score", "shards", Tally(4), console) as display:
        display.tally.add(pairs=10, rejected=2)
        display.tick()
    assert ("score: 1 of 4 shards, " in out.getvalue()) is not repainted
    assert ("1/4" in out.getvalue()) is repainted
    assert "2 rejected" in out.getvalue()
    assert ("\r" in out.getvalue()) is repainted


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (119, "2 min"), (3900, "1 h 05 min"), (532_800, "6 d 4 h")])
def test_rough_duration(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text
