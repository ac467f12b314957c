"""The linear datamodelling score (TRAK, arXiv 2303.14186): do summed utilities predict how a random half trains?"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.arrays import Bool, Float64
from pipeline.evaluation.small_run import SmallRun


def random_halves(n: int, count: int, seed: int) -> Bool:
    """`count` random halves of `n` pairs, bool `[count, n]`; exactly half of the pairs in each."""
    rng = np.random.default_rng(seed)
    halves = np.zeros((count, n), dtype=bool)
    for row in halves:
        row[rng.choice(n, size=n // 2, replace=False)] = True
    return halves


def outcomes(run: SmallRun, halves: Bool) -> Float64:
    """Minus the target loss after training on each half, `[count]`."""
    return np.asarray(-run.losses(torch.from_numpy(~halves)).numpy(), np.float64)


def predicted_outcomes(utilities: Float64, halves: Bool) -> Float64:
    """Summed utilities of each half: `utilities [..., n]` gives `[..., count]`."""
    return np.asarray(utilities @ halves.T.astype(np.float64), np.float64)
