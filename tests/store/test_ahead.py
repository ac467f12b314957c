"""Round trips in threads: results in order, a bounded number ahead of who wants them."""

from __future__ import annotations

import pytest

from pipeline.store import ahead


def test_results_come_in_order() -> None:
    assert list(ahead.in_order(str, range(3 * ahead.AHEAD + 1))) == [str(n) for n in range(3 * ahead.AHEAD + 1)]
    assert list(ahead.in_order(str, [])) == []


def test_no_more_is_begun_than_may_be_held() -> None:
    begun: list[int] = []
    results = ahead.in_order(begun.append, range(10 * ahead.AHEAD))
    assert not begun
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert 0 < len(begun) <= ahead.AHEAD


def test_an_error_reaches_who_asks() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ahead.in_order(lambda n: 1 // n, [1, 0, 1]))
