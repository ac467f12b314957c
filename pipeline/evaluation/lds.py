"""The linear datamodelling score (TRAK, arXiv 2303.14186): do summed utilities foretell how a random half trains?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.evaluation.correlation import Floats, spearman
from pipeline.evaluation.small_run import SmallRun

Bools = NDArray[np.bool_]


def random_halves(n: int, count: int, seed: int) -> Bools:
    """`count` random halves of `n` pairs, bool `[count, n]`; exactly half of the pairs in each."""
    rng = np.random.default_rng(seed)
    halves = np.zeros((count, n), dtype=bool)
    for row in halves:
        row[rng.choice(n, size=n // 2, replace=False)] = True
    return halves


def outcomes(run: SmallRun, halves: Bools) -> Floats:
    """Minus the target loss after training on each half, `[count]`."""
    return np.asarray(-run.losses(torch.from_numpy(~halves)).numpy(), np.float64)


def predicted_outcomes(utilities: Floats, halves: Bools) -> Floats:
    """Summed utilities of each half: `utilities [..., n]` gives `[..., count]`."""
    return np.asarray(utilities @ halves.T.astype(np.float64), np.float64)


def lds(utilities: Floats, halves: Bools, results: Floats) -> float:
    """Rank correlation of the summed utilities `[n]` of each half with its outcome `[count]`."""
    return spearman(predicted_outcomes(utilities, halves), results)
