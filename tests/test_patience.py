"""How long a worker may be silent."""

from __future__ import annotations

from pipeline.patience import FACTOR, LEAST, UNKNOWN, Patience


def test_what_is_given_goes() -> None:
    patience = Patience(7.0)
    patience.saw(1e6)
    assert patience.seconds == 7.0


def test_the_longest_shard_decides_with_a_floor() -> None:
    patience = Patience(None)
    assert patience.seconds == UNKNOWN
    patience.saw(1.0)
    assert patience.seconds == LEAST
    patience.saw(1000.0)
    patience.saw(10.0)
    assert patience.seconds == FACTOR * 1000.0


def test_what_computes_for_long_has_more_patience() -> None:
    tasks = Patience.of_computing(None)
    assert tasks.seconds > UNKNOWN
    tasks.saw(1.0)
    assert tasks.seconds == UNKNOWN
    assert Patience.of_computing(7.0).seconds == 7.0
