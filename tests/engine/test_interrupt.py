"""Ctrl-C: once to finish what is in hand, twice to stop."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.engine.interrupt import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_the_second_stops(number: int) -> None:
    before = signal.getsignal(number)
    said: list[str] = []
    with Interruption(lambda: said.append("finishing")) as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert said == ["finishing"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
