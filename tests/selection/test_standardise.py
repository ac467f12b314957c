"""Standardised terms of several runs, of which not all count for every pair."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from pipeline.selection.standardise import Moments, Standardisation, terms_matrix

NAN = math.nan
RUNS = np.array([0, 0, 1, 2])


def column(*rows):
    return pa.array(rows, pa.list_(pa.float32()))


def test_terms_are_as_large_as_if_all_runs_counted():
    found = terms_matrix(column([1, 2, 3, 4], None, [], [3, 6, None, None], [1, 2]), RUNS)
    expected = [[1, 2, 3, 4], [NAN] * 4, [NAN] * 4, [1, 2, NAN, NAN], [NAN] * 4]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected)


def test_zterms_average_the_runs_that_count_and_have_their_standard_error():
    how = Standardisation(np.array([1.0, 0.0, 0.0, 2.0]), np.array([1.0, 2.0, 0.0, 1.0]), RUNS, -1)
    # the third term is the same for all pairs and adds nothing
    mean, error = how.combine(column([2, 2, 9, 5], [None, None, None, 6], None))
    per_run = [-2.0, 0.0, -3.0]
    assert mean[0] == pytest.approx(np.mean(per_run))
    assert error[0] == pytest.approx(np.std(per_run, ddof=1) / math.sqrt(3))
    assert mean[1] == pytest.approx(-(6 / 3 - 2))  # one run of three counts
    assert math.isnan(error[1])
    assert math.isnan(mean[2])
    assert math.isnan(error[2])


@pytest.mark.parametrize(("agreement", "sign"), [(-1, -1), (0, 1), (1, 1)])
def test_the_sign_follows_most_pairs(agreement, sign):
    parts = [Moments.of(np.array([[1.0], [3.0]]), agreement), Moments.of(np.empty((0, 1)), 0)]
    how = Standardisation.of(parts, np.array([0]))
    assert (how.sign, how.mean.tolist(), how.std.tolist()) == (sign, [2.0], [1.0])
    one = Standardisation.of([Moments.of(np.array([[1.0], [3.0]]), 1), Moments.of(np.array([[8.0]]), 1)], np.array([0]))
    assert (one.mean.tolist(), one.std.tolist()) == ([4.0], [pytest.approx(np.std([1, 3, 8]))])
