"""Pairs in memory with the methods of a cache, a tiny proxy and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import Config, parse_config
from pipeline.models.clip import PairModel, build_model
from pipeline.types import PairBatch

#: A vocabulary of 256 tokens keeps the files small; the last one ends a text.
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 256, "width": 16, "heads": 1, "layers": 1},
}


class MemoryPairs:
    """`n` random pairs with `classes` different captions."""

    def __init__(self, n: int = 24, classes: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(1, 255, (classes, 8), generator=generator)
        tokens[:, -1] = 255
        captions = torch.arange(n) % classes
        self.all = PairBatch(images, tokens[captions], torch.arange(n), captions)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self.all.ids.numpy()

    def __len__(self) -> int:
        return len(self.all)

    def batch(self, rows: NDArray[np.int64]) -> PairBatch:
        return self.all[torch.from_numpy(np.ascontiguousarray(rows))]


class Factory:
    """Builds the tiny proxy of a run; can be sent to other processes."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None) -> None:
        self.path = str(folder / "model.json")
        Path(self.path).write_text(json.dumps(config or MODEL))

    def __call__(self, run: int) -> PairModel:
        return build_model(self.path, seed=run)


def config_of(seed: int = 0, equal_captions: str = "negative", stale: str = "refuse", **proxy: Any) -> Config:
    """A config whose proxy is tiny; the keywords are keys of `proxy`."""
    defaults = {"steps": 12, "batch_size": 8, "num_checkpoints": 3, "lr": 1e-3, "resume_every": 5, "model": "unused"}
    return parse_config(
        {
            "seed": seed,
            "data": {"shards": "unused.tar"},
            "reference": {"equal_captions": equal_captions},
            "engine": {"stale": stale},
            "proxy": defaults | proxy,
        }
    )
