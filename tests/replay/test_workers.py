"""Workers that share each batch take the steps that one worker with the whole batch takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.replay.schedule import TrainingSettings, data_order
from pipeline.replay.train import Trainer
from pipeline.replay.workers import Group, Workers
from pipeline.types import Tree
from tests.replay.pairs import MODEL, Factory, MemoryPairs

CASES = [
    TrainingSettings(steps=4, batch_size=8, lr=3e-3, eps=1e-3, grad_clip=0.5, augment=True),
    TrainingSettings(steps=4, batch_size=8, lr=0.05, optimizer="sgd", loss="siglip", equal_captions="ignore"),
]


def trained(folder: str, settings: TrainingSettings, workers: Workers | None = None) -> tuple[Tree, list[float]]:
    """Parameters and losses of a run in float64 whose captions repeat."""
    pairs = MemoryPairs(classes=6)
    model = Factory(Path(folder), MODEL | {"init_logit_bias": -1.0})(0).double()
    trainer = Trainer(model, pairs, data_order(np.arange(24), settings), settings, workers=workers)
    losses = [trainer.advance() for _ in range(settings.steps)]
    return trainer.checkpoint().params, losses


def work(rank: int, folder: str) -> None:
    own = Path(folder) / str(rank)
    own.mkdir()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    group = Group()
    assert group.agree(rank + 5) == 5
    results = [trained(str(own), settings, group) for settings in CASES]
    torch.save(results, own / "results.pt")
    dist.destroy_process_group()


def test_two_workers_equal_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    shares = [torch.load(tmp_path / str(rank) / "results.pt", weights_only=True) for rank in range(2)]
    for settings, first, second in zip(CASES, *shares, strict=True):
        params, losses = trained(str(tmp_path), settings)
        assert first[1] == second[1] == pytest.approx(losses, rel=1e-12)
        for name, value in params.items():
            assert torch.equal(first[0][name], second[0][name]), name
            torch.testing.assert_close(first[0][name], value, rtol=1e-9, atol=1e-12)
        changed, _ = trained(str(tmp_path), replace(settings, batch_size=4))
        assert not torch.allclose(changed["visual.proj"], params["visual.proj"], rtol=1e-6)
