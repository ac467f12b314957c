"""Every estimator's utilities of the pairs of a small run, and what they cost in forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.arrays import Float64
from pipeline.evaluation.flops import flop_counter
from pipeline.evaluation.small_run import SmallRun
from pipeline.influence import Batches, ProbePlan, Scorer, Settings, prepare_run, utility_of
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.passes import Passes
from pipeline.influence.trees import dot, plus
from pipeline.influence.unrolled import nearest_checkpoint
from pipeline.literals import EstimatorName
from pipeline.types import Checkpoint, PairBatch, Tree


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

    utilities: Float64
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


class RunEstimator:
    """Computes the forms on one run.

    Args:
        run: the run.
        recorded: the steps of its recorded checkpoints, ascending.
        reference: R; the pairs of the run are B, its target is V.
    """

    def __init__(self, run: SmallRun, recorded: Sequence[int], reference: PairBatch) -> None:
        self.run = run
        self.recorded = list(recorded)
        self.reference = reference
        self.batches = Batches(reference, run.data, run.target)
        self._unit = flops_of_a_pass(run)
        self._replayed: tuple[list[ProbePlan], int] | None = None

    def estimate(self, form: Form) -> Estimate:
        """The utilities that a form gives the pairs of the run, and its cost."""
        run, settings = self.run, form.settings
        plans, directions = self._plans(form)
        checkpoints = run.states if form.every_step else [run.states[step] for step in self.recorded]
        with flop_counter() as counter:  # R is embedded once however many pairs are scored
            parts = [] if form.own_batches else list(zip(checkpoints, plans, strict=True))
            scorer = Scorer(run.model, parts, self.reference, settings)
        directions += counter.get_total_flops()
        with flop_counter() as counter:
            if form.own_batches:
                scores = _against_own_batches(run, plans, settings)
            else:
                scores = scorer.score(run.data).terms.sum(1)
        utilities = utility_of(settings.estimator, np.asarray(scores.double().numpy(), np.float64))
        return Estimate(utilities, directions / self._unit, counter.get_total_flops() / self._unit)

    def _plans(self, form: Form) -> tuple[list[ProbePlan], int]:
        """The plans of a form and the operations they took; the exact replay is done once for all its forms."""
        if form.settings.replay == "checkpoints":
            return self._prepared(form.settings, [self.run.states[step] for step in self.recorded])
        if self._replayed is None:
            self._replayed = self._prepared(form.settings, self.run.states)
        plans, flops = self._replayed
        return (plans if form.every_step else gathered(plans, self.recorded)), flops

    def _prepared(self, settings: Settings, checkpoints: Sequence[Checkpoint]) -> tuple[list[ProbePlan], int]:
        run = self.run
        replay = run.replay() if settings.replay == "exact" else None
        with flop_counter() as counter:
            plans = prepare_run(
                run.model, checkpoints, self.batches, settings, dataset_size=len(run.data), replay=replay
            )
        return plans, counter.get_total_flops()


def gathered(plans: Sequence[ProbePlan], recorded: Sequence[int]) -> list[ProbePlan]:
    """Plans of every step from 0 on, each direction moved to the recorded step nearest to its own."""
    sums: list[Tree] = [{} for _ in recorded]
    for step, plan in enumerate(plans[:-1]):  # no step follows the last state
        near = nearest_checkpoint(recorded, step)
        sums[near] = plus(sums[near], plan.vectors["v"])
    return [ProbePlan(plans[0].probes, {"v": total}) for total in sums]


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
    """Floating-point operations of one forward pass over the pairs of the run, its attention as plain products."""
    passes = Passes(run.model, Settings())
    with torch.no_grad(), passes.ready(), flop_counter() as counter:
        run.model(run.data.images, run.data.tokens)
    return float(counter.get_total_flops())


def reference_of(data: PairBatch, count: int, seed: int) -> PairBatch:
    """R of a small run: `count` of its pairs by the seed, or all of them where there are fewer."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    return data[torch.from_numpy(rows)]
