"""Leave-one-out: what really happens to the target loss when one pair is missing, everything else equal."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.arrays import Float64, Int64
from pipeline.evaluation.small_run import SmallRun


def left_out_pairs(n: int, count: int, seed: int) -> Int64:
    """The rows that are left out one at a time: `count` of `n`, drawn by the seed, sorted."""
    return np.sort(np.random.default_rng(seed).choice(n, size=min(count, n), replace=False)).astype(np.int64)


def left_out_changes(run: SmallRun, rows: Int64, removal: float = 1.0) -> Float64:
    """Change of the target loss from training without each of `rows`, `[k]`; positive for pairs that help.

    With a `removal` below 1 only that share of each pair is taken away: what a first-order estimator predicts.
    """
    without = torch.zeros(len(rows) + 1, len(run.data), dtype=torch.bool)
    without[torch.arange(len(rows)) + 1, torch.from_numpy(rows)] = True
    losses = run.losses(without, removal)
    return np.asarray((losses[1:] - losses[0]).numpy(), np.float64)
