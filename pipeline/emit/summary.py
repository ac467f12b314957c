"""The account of a selection: what went in is what was kept, what was pruned and what was rejected, by reason."""

from __future__ import annotations

from typing import Any

from pipeline.errors import StageError
from pipeline.selection.summary import SelectionSummary


def account(selection: SelectionSummary) -> dict[str, Any]:
    """Counts for `summary.json`: pairs in, kept, pruned and rejected by reason, and the threshold.

    Raises `StageError` when they don't add up.
    """
    pruned, rejected = sum(selection.pruned.values()), sum(selection.rejected.values())
    if selection.total != selection.kept + pruned + rejected:
        raise StageError(
            f"selection {selection.name!r}: expected kept + pruned + rejected to be the {selection.total} pairs in, "
            f"found {selection.kept} + {pruned} + {rejected}"
        )
    return {
        "selection": selection.name,
        "in": selection.total,
        "kept": selection.kept,
        "pruned": pruned,
        "pruned_by_reason": dict(sorted(selection.pruned.items())),
        "rejected": rejected,
        "rejected_by_reason": dict(sorted(selection.rejected.items())),
        "threshold": selection.threshold,
    }
