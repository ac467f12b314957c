"""How close a run is to its stability limit: the largest `eta * lambda_max` along it."""

from __future__ import annotations

import torch

from pipeline.evaluation.small_run import SmallRun
from pipeline.influence import Batches, Settings
from pipeline.influence.lanczos import krylov
from pipeline.influence.local import LocalView

#: Dimension of the Krylov subspace whose largest Ritz value is taken.
_KRYLOV_STEPS = 12


def steepness(run: SmallRun, settings: Settings) -> float:
    """Largest `eta_s * lambda_max` of the steps 0, 1, 2, 4, 8 ... and the last, each with its own batch.

    `lambda_max` is that of `P^1/2 H P^1/2`. It is largest where a run starts, so looking at recorded checkpoints alone
    would miss it.
    """
    steps = {0, run.steps - 1, *(2**power for power in range(run.steps.bit_length()))}
    found: list[float] = [run.recipe.rates[step] * _largest(run, step, settings) for step in steps if step < run.steps]
    return max(found)


def stability_limit(run: SmallRun) -> float:
    """Where steps of the run's optimizer stop converging: 2 for plain SGD, `2 (1 + beta) / (1 - beta)` for Adam.

    Heavy-ball momentum, whose steps are not averages, has `2 (1 + beta)`.
    """
    rule = run.recipe.rule
    if rule.optimizer == "adamw":
        return 2 * (1 + rule.beta1) / (1 - rule.beta1)
    return 2 * (1 + rule.momentum)


def _largest(run: SmallRun, step: int, settings: Settings) -> float:
    batches = Batches(run.data, run.batch(step), run.target)
    here = LocalView(run.model, run.states[step], batches, settings)
    operator, root = here.scaled_hessian()
    start = torch.randn(root.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(root)
    return float(krylov(operator, start, _KRYLOV_STEPS).values[-1])
