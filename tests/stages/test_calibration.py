"""Timing by growing sizes: what is measured in full is not extrapolated, and what is, goes by the slope."""

from __future__ import annotations

import pytest

from pipeline.stages import calibration
from pipeline.stages.calibration import seconds_of


class Clock:
    """Time that passes only by work: `fixed` seconds a call and one hundredth per item."""

    def __init__(self, fixed: float) -> None:
        self.fixed = fixed
        self.now = 0.0
        self.sizes: list[int] = []

    def perf_counter(self) -> float:
        return self.now

    def work(self, size: int) -> None:
        self.sizes.append(size)
        self.now += self.fixed + 0.01 * size


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(1.0)
    monkeypatch.setattr(calibration, "time", clock)
    return clock


def test_a_size_within_reach_is_measured(clock: Clock) -> None:
    assert seconds_of(clock.work, 24, 100, 2.0) == pytest.approx(1.24)
    assert max(clock.sizes) == 24


def test_beyond_the_time_or_the_pairs_it_goes_by_the_slope(clock: Clock) -> None:
    assert seconds_of(clock.work, 10_000, 10_000, 1.5) == pytest.approx(101.0)
    assert max(clock.sizes) == 64
    clock.sizes.clear()
    assert seconds_of(clock.work, 10_000, 20, 100.0) == pytest.approx(101.0)
    assert max(clock.sizes) == 20


def test_what_a_call_costs_whatever_its_size_is_not_scaled(clock: Clock) -> None:
    clock.fixed = 30.0  # longer than the time there is
    assert seconds_of(clock.work, 800, 800, 2.0) == pytest.approx(38.0)
    assert max(clock.sizes) == 16
    clock.sizes.clear()
    assert seconds_of(clock.work, 800, 8, 2.0) == pytest.approx(800 / 8 * 30.08)  # no second size to be had
