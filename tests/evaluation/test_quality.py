from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.evaluation.quality import auroc, detect, read_truth


def test_auroc_counts_pairs_in_the_right_order_and_ties_half() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 20, 200).astype(float)
    wrong = rng.random(200) < 0.3
    below = values[wrong][:, None] < values[~wrong][None, :]
    equal = values[wrong][:, None] == values[~wrong][None, :]
    assert auroc(values, wrong) == pytest.approx((below + 0.5 * equal).mean())


def test_auroc_of_a_perfect_ranking_is_one_and_of_one_kind_undefined() -> None:
    assert auroc(np.array([0.0, 1.0, 2.0]), np.array([True, False, False])) == 1
    assert np.isnan(auroc(np.array([0.0, 1.0]), np.array([False, False])))


def test_detect_leaves_out_values_that_are_not_finite() -> None:
    found = detect(np.array([0.0, np.nan, 1.0, 2.0]), np.array([True, True, False, True]), suspects=2)
    assert (found.pairs, found.precision, found.recall) == (3, 0.5, 0.5)
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)


def test_a_caption_is_wrong_where_it_names_another_class(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    path.write_text("uid,clean,caption_class\na,cat,cat\nb,cat,dog\n")
    assert read_truth(str(path)) == {"a": False, "b": True}


def test_a_truth_file_without_its_columns_is_named(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    path.write_text("uid,clean\na,cat\n")
    with pytest.raises(InputError, match=r"truth.csv: expected columns .*; missing: caption_class"):
        read_truth(str(path))
    with pytest.raises(InputError, match=r"nowhere.csv: expected a CSV"):
        read_truth(str(tmp_path / "nowhere.csv"))
