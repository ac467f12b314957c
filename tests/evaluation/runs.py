"""A run of a model with 148 parameters, in memory: retraining it a hundred times takes a second."""

from __future__ import annotations

import torch

from pipeline.evaluation.masked import Recipe
from pipeline.evaluation.small_run import SmallRun
from pipeline.influence import StepRule
from pipeline.literals import OptimizerName
from pipeline.types import Checkpoint
from tests.influence.towers import SmallTowers, make_pairs, state_of


def make_run(
    optimizer: OptimizerName = "sgd", batch: int = 24, steps: int = 30, rate: float = 0.05, seed: int = 0, **rule: float
) -> SmallRun:
    """24 pairs, 16 others as the target; with `batch` 24 every step sees all pairs."""
    model = SmallTowers(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(24, generator=generator)[:batch] for _ in range(steps)])
    start = Checkpoint(0, 0.0, 0, state_of(model), {})
    made = Recipe(order, [rate] * steps, StepRule(optimizer, {}, **rule))
    return SmallRun(model, start, make_pairs(24, 5), make_pairs(16, 6, first_id=100), made)
