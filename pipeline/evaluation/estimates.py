"""Every estimator's utilities of the pairs of a small run, and what they cost in forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import EstimatorName
from pipeline.evaluation.correlation import Floats
from pipeline.evaluation.small_run import SmallRun
from pipeline.influence import UTILITY_SIGN, Batches, ProbePlan, Scorer, Settings, prepare_run
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.passes import Passes
from pipeline.influence.trees import dot
from pipeline.types import PairBatch


@dataclass(frozen=True)
class Form:
    """An estimator and how it is computed.

    Attributes:
        name: in tables.
        settings: of the influence engine.
        every_step: directions and terms at every step of the run instead of at its recorded checkpoints.
        own_batches: the terms of a step are those of the pairs it saw, against its own batch in place of R.
    """

    name: str
    settings: Settings
    every_step: bool = False
    own_batches: bool = False


@dataclass(frozen=True)
class Estimate:
    """Utilities of the `n` pairs of a run, and their cost.

    Attributes:
        utilities: float64 `[n]`, higher is keep.
        directions: cost of the directions, in forward passes over the `n` pairs.
        scoring: cost of scoring the pairs, in forward passes over them.
    """

    utilities: Floats
    directions: float
    scoring: float


def forms_of(estimators: Sequence[EstimatorName], settings: Settings) -> list[Form]:
    """The forms that are compared: `unrolled` in its four, of every other estimator the one of the config."""
    forms: list[Form] = []
    for name in estimators:
        own = replace(settings, estimator=name)
        if name != "unrolled":
            forms.append(Form(name, own))
            continue
        exact = replace(own, replay="exact")
        forms += [
            Form("unrolled (checkpoints)", replace(own, replay="checkpoints")),
            Form("unrolled (replayed)", exact),
            Form("unrolled (every step)", exact, every_step=True),
            Form("unrolled (own batches)", exact, every_step=True, own_batches=True),
        ]
    return forms


def estimate(run: SmallRun, recorded: Sequence[int], reference: PairBatch, form: Form) -> Estimate:
    """The utilities that a form gives the pairs of a run.

    Args:
        run: the run.
        recorded: the steps of its recorded checkpoints, ascending.
        reference: R; the pairs of the run are B, its target is V.
        form: the estimator.
    """
    checkpoints = run.states if form.every_step else [run.states[step] for step in recorded]
    batches = Batches(reference, run.data, run.target)
    with FlopCounterMode(display=False) as counter:
        plans = prepare_run(
            run.model,
            checkpoints,
            batches,
            form.settings,
            dataset_size=len(run.data),
            replay=run.replay() if form.settings.replay == "exact" else None,
        )
        # R is embedded once however many pairs are scored.
        scorer = Scorer(run.model, list(zip(checkpoints, plans, strict=True)), reference, form.settings)
    directions = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        if form.own_batches:
            scores = _against_own_batches(run, plans, form.settings)
        else:
            scores = scorer.score(run.data).terms.sum(1)
    unit = flops_of_a_pass(run)
    utilities = UTILITY_SIGN[form.settings.estimator] * np.asarray(scores.double().numpy(), np.float64)
    return Estimate(utilities, directions / unit, counter.get_total_flops() / unit)


def _against_own_batches(run: SmallRun, plans: list[ProbePlan], settings: Settings) -> torch.Tensor:
    """The first-order change of this very run when a pair is missing, `[n]`.

    Without `z` a batch of `b` has the gradient `G - (G_z - G) / (b - 1)`, with `G_z` against the rest of the batch and
    `G` that of the whole: at each step that saw `z` the direction meets `G_z - G`.
    """
    scores = torch.zeros(len(run.data), dtype=torch.float64)
    passes = Passes(run.model, settings)
    for step, plan in enumerate(plans[:-1]):  # no step follows the last state
        state, batch = run.states[step], run.batch(step)
        terms = Scorer(run.model, [(state, plan)], batch, settings).score(batch).terms.sum(1).double()
        gradient = BatchLoss(passes, batch, list(state.params)).gradient({**state.params, **state.buffers})
        (probe,) = plan.probes
        whole = probe.weight * dot(plan.vectors["v"], gradient)
        scores.index_add_(0, run.recipe.order[step], (terms - whole) / (len(batch) - 1))
    return scores


def flops_of_a_pass(run: SmallRun) -> float:
    """Floating-point operations of one forward pass over the pairs of the run."""
    return _flops(lambda: run.model(run.data.images, run.data.tokens))


def _flops(function: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def reference_of(data: PairBatch, count: int, seed: int) -> PairBatch:
    """R of a small run: `count` of its pairs by the seed, or all of them where there are fewer."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    return data[torch.from_numpy(rows)]
