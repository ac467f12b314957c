"""What a run recorded about itself beside its scores: config, versions, checkpoints, summary. Read tolerantly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config import DataConfig
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.text import count


def optional_json(url: str) -> dict[str, Any]:
    """The JSON object at `url`; an empty one where there is none."""
    try:
        value = storage.read_json(url)
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _recorded(run: RunFolder) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(storage.read_bytes(run.config))
    except FileNotFoundError:
        return {}
    return dict(tree)


def provenance(run: RunFolder) -> dict[str, Any]:
    """What `config.yaml` holds beside the config itself: versions, revision, fingerprint."""
    return {name: value for name, value in _recorded(run).items() if name != "config"}


def data_config(run: RunFolder) -> DataConfig:
    """Where the run's captions are and how large its images may be; the defaults where that is not recorded."""
    recorded = _recorded(run)
    return DataConfig.model_validate(recorded["config"]["data"]) if recorded else DataConfig(shards=[])


def checkpoint_names(manifest: Mapping[str, Any], terms: int) -> list[str]:
    """What to call the checkpoint of each term: its step, and its run where there are several."""
    entries = manifest.get("checkpoints") or []
    if len(entries) != terms:
        return [f"term {i + 1}" for i in range(terms)]
    several = len({entry.get("run", 0) for entry in entries}) > 1
    prefix = [f"run {int(entry.get('run', 0)) + 1}, " if several else "" for entry in entries]
    return [f"{run}step {count(entry.get('step', 0))}" for run, entry in zip(prefix, entries, strict=True)]
