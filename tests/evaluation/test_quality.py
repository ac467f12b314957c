from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

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
    found = detect(np.array([0.0, np.nan, 1.0, 2.0]), np.array([True, True, False, True]))
    assert (found.pairs, found.suspects, found.precision) == (3, 2, 0.5)
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)


def test_a_perfect_ranking_of_the_pairs_with_a_value_is_perfect() -> None:
    values = np.concatenate([np.full(5, np.nan), np.arange(95.0)])
    found = detect(values, np.arange(100) < 10)
    assert (found.auroc, found.average_precision, found.precision) == (1, 1, 1)


def test_ties_count_as_in_the_mean_over_their_orders() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, 60).astype(float)
    wrong = rng.random(60) < 0.4
    found = detect(values, wrong)
    suspects = int(wrong.sum())
    precisions = []
    for _ in range(4000):
        order = rng.permutation(60)
        lowest = order[np.argsort(values[order], kind="stable")][:suspects]
        precisions.append(wrong[lowest].mean())
    assert found.precision == pytest.approx(np.mean(precisions), abs=0.005)
    assert found.average_precision == pytest.approx(average_precision_score(wrong, -values))
    blind = detect(np.zeros(60), wrong)
    assert blind.precision == pytest.approx(wrong.mean())
    assert blind.average_precision == pytest.approx(wrong.mean())


def test_a_caption_is_wrong_where_it_names_another_class(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    path.write_text("uid,clean,caption_class\na,cat,cat\nb,cat,dog\n")
    assert read_truth(str(path)) == {"a": False, "b": True}
    path.write_text("uid,clean,caption_class\na,cat,cat\n", encoding="utf-8-sig")
    assert read_truth(str(path)) == {"a": False}


def test_a_truth_file_without_its_columns_is_named(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    path.write_text("uid,clean\na,cat\n")
    with pytest.raises(InputError, match=r"truth.csv: expected columns .*; missing: caption_class"):
        read_truth(str(path))
    with pytest.raises(InputError, match=r"nowhere.csv: expected a CSV"):
        read_truth(str(tmp_path / "nowhere.csv"))
    path.write_text("uid,clean,caption_class\na,cat," + "x" * 200_000)
    with pytest.raises(InputError, match=r"truth.csv: expected a CSV .*: field larger than field limit"):
        read_truth(str(path))
