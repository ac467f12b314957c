"""diffprune: which image-text pairs help a CLIP model, and the shards to train on those alone.

The public surface, loaded when it is first used (`import pipeline` loads neither torch nor Ray):

- configs: `Config`, `load_config`, `parse_config`;
- a run's files: `open_scores` and `select`, and `RunFolder` for the paths of all others;
- influence of pairs held in Python: `build_model`, `encode_pairs`, `score_pairs`, with `Settings`, `Batches` and
  `PairBatch`, and underneath `prepare_run`, `Scorer` and `utility_of`;
- checkpoints, of a training loop of one's own too: `Checkpoint`, `checkpoint_of`, `load_checkpoint`, `save_checkpoint`;
- the errors of users: `DiffpruneError` and those derived from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import PairScores, encode_pairs, score_pairs
    from pipeline.config import Config, load_config, parse_config
    from pipeline.errors import ConfigError, DiffpruneError, FingerprintError, InputError, StageError
    from pipeline.finished import open_scores, select
    from pipeline.influence import Batches, Scorer, Settings, prepare_run, utility_of
    from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
    from pipeline.models.clip import build_model
    from pipeline.models.snapshot import checkpoint_of
    from pipeline.run import RunFolder
    from pipeline.types import AdamState, Checkpoint, Features, PairBatch

_HOME = {
    "pipeline.api": ("PairScores", "encode_pairs", "score_pairs"),
    "pipeline.config": ("Config", "load_config", "parse_config"),
    "pipeline.errors": ("ConfigError", "DiffpruneError", "FingerprintError", "InputError", "StageError"),
    "pipeline.finished": ("open_scores", "select"),
    "pipeline.influence": ("Batches", "Scorer", "Settings", "prepare_run", "utility_of"),
    "pipeline.models.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "pipeline.models.clip": ("build_model",),
    "pipeline.models.snapshot": ("checkpoint_of",),
    "pipeline.run": ("RunFolder",),
    "pipeline.types": ("AdamState", "Checkpoint", "Features", "PairBatch"),
}

__all__ = [
    "AdamState",
    "Batches",
    "Checkpoint",
    "Config",
    "ConfigError",
    "DiffpruneError",
    "Features",
    "FingerprintError",
    "InputError",
    "PairBatch",
    "PairScores",
    "RunFolder",
    "Scorer",
    "Settings",
    "StageError",
    "build_model",
    "checkpoint_of",
    "encode_pairs",
    "load_checkpoint",
    "load_config",
    "open_scores",
    "parse_config",
    "prepare_run",
    "save_checkpoint",
    "score_pairs",
    "select",
    "utility_of",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOME.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
