"""How well low values point at the pairs that are known to be wrong (for judging only, never an input)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.arrays import Bool, Float64
from pipeline.errors import InputError
from pipeline.store import storage

_TRUTH_COLUMNS = ("uid", "clean", "caption_class")


@dataclass(frozen=True)
class Detection:
    """Quality of a ranking of suspects. Pairs of one value count as in the mean over all their orders.

    Attributes:
        auroc: chance that a wrong pair is ranked below a right one (0.5 is blind).
        average_precision: area under precision over recall, wrong pairs found from the low end.
        precision: share of wrong pairs among the `suspects` lowest.
        base_rate: share of wrong pairs in all.
        suspects: how many pairs are wrong, so that `precision` is recall as well.
        pairs: how many pairs have a known truth and a finite value.
    """

    auroc: float
    average_precision: float
    precision: float
    base_rate: float
    suspects: int
    pairs: int

    def to_dict(self) -> dict[str, float]:
        """The attributes by name; NaN where one kind of pairs is missing."""
        return asdict(self)


def auroc(values: Float64, wrong: Bool) -> float:
    """Chance that a wrong pair has a lower value than a right one, ties counted half; NaN if one kind is missing."""
    low, high = values[wrong], np.sort(values[~wrong])
    if not len(low) or not len(high):
        return float("nan")
    above = len(high) - (np.searchsorted(high, low, "left") + np.searchsorted(high, low, "right")) / 2
    return float(above.mean() / len(high))


def detect(values: Float64, wrong: Bool) -> Detection:
    """Judge a ranking, `values [n]` (low is suspect), against `wrong [n]`. Non-finite values are left out."""
    finite = np.isfinite(values)
    values, wrong = values[finite], wrong[finite]
    _, group = np.unique(values, return_inverse=True)
    sizes = np.bincount(group)
    hits = np.bincount(group, weights=wrong)
    ends, found = np.cumsum(sizes), np.cumsum(hits)
    n_wrong = int(wrong.sum())
    nan = float("nan")
    return Detection(
        auroc=auroc(values, wrong),
        average_precision=float((hits * found / ends).sum() / n_wrong) if n_wrong else nan,
        precision=float(np.interp(n_wrong, [0, *ends], [0, *found]) / n_wrong) if n_wrong else nan,
        base_rate=float(wrong.mean()) if len(wrong) else nan,
        suspects=n_wrong,
        pairs=len(wrong),
    )


def read_truth(url: str) -> dict[str, bool]:
    """Which uids have a wrong caption, from a CSV of `uid`, `clean` (the true class), `caption_class` (the named one).

    Raises `InputError` for a file that is missing or lacks a column.
    """
    try:
        # Spreadsheets begin a CSV with a mark.
        rows = csv.DictReader(io.StringIO(storage.read_bytes(url).decode("utf-8-sig")))
        missing = set(_TRUTH_COLUMNS) - set(rows.fieldnames or ())
        truth = {} if missing else {row["uid"]: row["clean"] != row["caption_class"] for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{url}: expected a CSV with columns {', '.join(_TRUTH_COLUMNS)}: {error}") from None
    if missing:
        raise InputError(f"{url}: expected columns {', '.join(_TRUTH_COLUMNS)}; missing: {', '.join(sorted(missing))}")
    return truth


def match_truth(url: str, uids: Sequence[str]) -> tuple[Bool, Bool]:
    """Which of a run's pairs the truth at `url` knows, and which have a wrong caption: bool `[uids]` each.

    A uid is empty where nothing is known of the pair. Raises `InputError` as `read_truth` does, and where the truth
    knows none of them.
    """
    truth = read_truth(url)
    known = np.array([uid in truth for uid in uids], dtype=bool)
    if not known.any():
        pairs = sum(1 for uid in uids if uid)
        raise InputError(
            f"{url}: expected the uids of this run's pairs, none of its {len(truth):,} is among the run's {pairs:,}"
        )
    return known, np.array([truth.get(uid, False) for uid in uids], dtype=bool)
