"""`README.md` of a selection: a dataset card in Hugging Face's form that says what the pairs are and where from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo
from pipeline.emit.templates import render
from pipeline.selection.summary import SelectionSummary
from pipeline.text import plural, without_secrets

#: Input shards that the card lists; the manifest has them all.
INPUTS_SHOWN = 50

_CATEGORIES = [
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
]  # fmt: skip


def render_card(
    config: Config,
    inventory: Sequence[ShardInfo],
    selection: SelectionSummary,
    *,
    counts: dict[str, Any],
    scored_by: dict[str, Any],
    command: str,
    files: dict[str, Any],
) -> str:
    """The card's Markdown, without what in addresses gives access.

    Args:
        selection: what is handed over; its own settings are stated, whatever the config's.
        counts: `summary.account` of the selection.
        scored_by: what decided the scores (fingerprint parts): checkpoints' digests, estimator and settings, ...
        command: the command line that made it, "" where unknown.
        files: `uids`, `tars`, `suffixed`, `json_added`, `json_without_uid` of `EmitSummary`.
    """
    tree = config.model_dump(mode="json")
    tree["select"] = selection.config | ({} if selection.seed == config.seed else {"seed": selection.seed})
    settings = {"seed": config.seed, **{name: tree[name] for name in ("data", "target", "proxy", "select", "emit")}}
    card = render(
        "card.md.j2",
        counts=counts,
        by=selection.config["by"],
        estimator=scored_by.get("score", {}).get("estimator"),
        version=version("diffprune"),
        size_category=size_category(counts["kept"]),
        inventory=inventory,
        inputs_shown=INPUTS_SHOWN,
        scores=selection.scores,
        scored_by=json.dumps(scored_by, indent=2, sort_keys=True),
        settings=yaml.safe_dump(settings, sort_keys=False).rstrip(),
        command=command,
        caption=config.data.caption,
        plural=plural,
        **files,
    )
    return without_secrets(card)


def size_category(pairs: int) -> str:
    """The hub's name for the size of a dataset."""
    return next((name for bound, name in _CATEGORIES if pairs < bound), "n>1T")
