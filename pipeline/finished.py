"""Using a finished run from Python: its scores as Arrow, and further selections."""

from __future__ import annotations

from typing import Any

import pyarrow.dataset

from pipeline.config import parse_config
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection.select import select as make_selection
from pipeline.selection.summary import SelectionSummary
from pipeline.store import commits, storage


def open_scores(run: str) -> pyarrow.dataset.Dataset:
    """The scores of a run as one Arrow dataset (columns: `docs/outputs.md`); shards without a commit mark are left out.

    Args:
        run: a run's folder: a path or an fsspec URL.

    Raises `StageError` where there is no run. Nothing is read before it is asked for:

    >>> import pyarrow.compute as pc
    >>> scores = open_scores(run)
    >>> scores.count_rows(filter=pc.field("status") == "ok")
    16
    >>> scores.to_table(columns=["uid", "utility"]).sort_by([("utility", "descending")])["utility"].to_pylist()[:1]
    [1.304...]
    """
    folder = RunFolder(run)
    if not storage.exists(folder.inventory):
        raise StageError(f"{run}: expected a run's folder, found no inventory there")
    return commits.open_scores(folder)


def select(run: str, *, seed: int = 0, dry_run: bool = False, **settings: Any) -> SelectionSummary:
    """Choose the pairs of a scored run that are kept, and write the keep lists unless `dry_run`.

    Args:
        run: a run's folder: a path or an fsspec URL.
        seed: decides random choices among ties, and clusters. With the `seed` of the config the selection is that of
            `diffprune select`.
        dry_run: write nothing.
        settings: the keys of the config's `select` section.

    Raises `ConfigError` for settings that do not fit, `StageError` without scores.

    >>> plan = select(run, keep=0.25, by="utility", dry_run=True)
    >>> plan.total, plan.kept, plan.pruned
    (16, 4, {'quota': 12})
    >>> select(run, keep=1.5, dry_run=True)
    Traceback (most recent call last):
    pipeline.errors.ConfigError: select.keep: expected a fraction in (0, 1], found 1.5
    """
    config = parse_config({"data": {"shards": []}, "select": settings})
    return make_selection(RunFolder(run), config.select, seed=seed, dry_run=dry_run)
