"""What is said of two sets' results: that they differ, only where seeds alone would hardly give it."""

from __future__ import annotations

import numpy as np
from scipy.stats import ttest_ind

from pipeline.evaluation.results import Result


def result(values: list[float]) -> Result:
    return Result.of("a", "a", None, 10, "accuracy", values)


def test_sets_differ_where_welchs_test_says_so() -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(200):
        one, other = rng.normal(0, 1, 3).tolist(), rng.normal(2, 2, 4).tolist()
        verdicts.append(result(one).differs_from(result(other)))
        assert verdicts[-1] == (ttest_ind(one, other, equal_var=False).pvalue < 0.05)
    assert any(verdicts)
    assert not all(verdicts)


def test_seeds_of_one_and_the_same_set_rarely_differ() -> None:
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        found = [
            result(rng.normal(size=seeds).tolist()).differs_from(result(rng.normal(size=seeds).tolist()))
            for _ in range(1000)
        ]
        assert np.mean(found) < 0.07


def test_without_a_spread_there_is_nothing_to_hold_a_difference_against() -> None:
    assert not result([0.5]).differs_from(result([0.1, 0.2]))
    assert result([0.5, 0.5]).differs_from(result([0.1, 0.1]))
    assert not result([0.5, 0.5]).differs_from(result([0.5, 0.5]))
