"""Small configs for runs from shards to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import Config, parse_config

#: A proxy that trains in a second: two checkpoints of a small model.
PROXY = {"model": "digits-vit", "steps": 6, "batch_size": 8, "lr": 1e-3, "num_checkpoints": 2}


def small_config(shards: list[str] | str, out: Path | str, **sections: dict[str, Any]) -> Config:
    """A config of a quick run; keys of `sections` are joined into the defaults here."""
    tree: dict[str, Any] = {
        "out": str(out),
        "data": {"shards": shards},
        "target": {"pairs": 4},
        "reference": {"pairs": 6, "gradient_pairs": 8},
        "proxy": dict(PROXY),
        "select": {"keep": 0.5},
        "engine": {"retry_wait": 0.01},
        "emit": {"materialize": True, "pairs_per_shard": 5},
        "report": {"gallery": 3},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_config(tree)
