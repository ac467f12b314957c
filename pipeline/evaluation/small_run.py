"""A training run small enough to be repeated many times without some of its pairs, every state of it kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.evaluation.masked import Recipe, checkpoint_of, compact_vocabulary, target_losses, train_masked
from pipeline.influence import Replay
from pipeline.models.checkpoint import decay_of_each
from pipeline.models.clip import PairModel, split_state
from pipeline.replay.record import step_rule
from pipeline.replay.schedule import TrainingSettings, data_order, learning_rates
from pipeline.types import Checkpoint, PairBatch, Tree

#: Models trained side by side: enough to fill the matrix products, few enough for the cache.
STACK = 16

#: Pairs per step of the steps that a run starts after.
WARM_BATCH = 64


@dataclass
class SmallRun:
    """One run: its start, its pairs and its recipe.

    Attributes:
        model: on the CPU, with the vocabulary in use.
        start: the weights before the first step.
        data: the `n` training pairs.
        target: V.
        recipe: the order of the pairs, the rates and the optimizer.
        on_trained: called with the number of models that were trained side by side, whenever some were.
    """

    model: torch.nn.Module
    start: Checkpoint
    data: PairBatch
    target: PairBatch
    recipe: Recipe
    on_trained: Callable[[int], None] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.recipe.rates)

    @cached_property
    def states(self) -> list[Checkpoint]:
        """The run's state after every step, from step 0 on."""
        found = [self.start]

        def keep(step: int, params: Tree, first: Tree, second: Tree) -> None:
            rate = self.recipe.rates[step - 1]
            found.append(checkpoint_of(0, step, rate, params, first, second, self.start, self.recipe.rule))

        train_masked(self.model, self.start, self.data, self._masks(1), self.recipe, at_step=keep)
        return found

    def batch(self, step: int) -> PairBatch:
        """The pairs of the step from `step` to `step + 1`."""
        return self.data[self.recipe.order[step]]

    def retrained(self, without: Tensor, removal: float = 1.0) -> Tree:
        """Parameters after training without some pairs, stacked `[M, ...]`.

        Args:
            without: bool `[M, n]`.
            removal: how much of them is taken away (`train_masked`).
        """
        parts = []
        for rows in torch.split(without, STACK):
            masks = self._masks(len(rows)).masked_fill(rows, 0)
            parts.append(train_masked(self.model, self.start, self.data, masks, self.recipe, removal=removal))
            if self.on_trained is not None:
                self.on_trained(len(rows))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def losses(self, without: Tensor, removal: float = 1.0) -> Tensor:
        """Mean target loss after training without some pairs, float64 `[M]`; arguments as for `retrained`."""
        parts = torch.split(without, STACK)
        return torch.cat([self.target_losses(self.retrained(rows, removal)) for rows in parts])

    def target_losses(self, stacked: Tree) -> Tensor:
        """Mean target loss under each of the stacked parameters, float64 `[M]`."""
        return target_losses(self.model, stacked, self.start.buffers, self.target, self.recipe).double()

    def replay(self) -> Replay:
        """What `unrolled` needs to go back through this run step by step."""
        return Replay(self.recipe.rule, self.recipe.rates, self.batch, self.start)

    def _masks(self, count: int) -> Tensor:
        dtype = next(iter(self.start.params.values())).dtype
        return torch.ones(count, len(self.data), dtype=dtype)


def small_run(
    config: Config,
    model: PairModel,
    data: PairBatch,
    target: PairBatch,
    run: int,
    others: PairBatch | None = None,
    dtype: torch.dtype = torch.float64,
) -> SmallRun:
    """A run with the proxy's settings on `data`, `validation.steps` long; its data order is that of run number `run`.

    Batches larger than the data become all of the data; `proxy.augment` is left out. With `others`, it starts after
    `validation.warm_steps` on these, and an AdamW run goes on with the moments of those steps. `model` is changed.
    """
    size = min(config.proxy.batch_size, len(data))
    update = {"batch_size": size, "steps": config.validation.steps, "workers": 1, "subset": 1.0}
    sized = config.model_copy(update={"proxy": config.proxy.model_copy(update=update)})
    settings = TrainingSettings.of(sized, len(data), run)
    order = data_order(np.arange(len(data)), settings)
    batches = [data, target] if others is None else [data, target, others]
    small, (data, target, *rest) = compact_vocabulary(model, batches)
    params, buffers = split_state(small.to(dtype))
    recipe = Recipe(
        order=torch.from_numpy(order),
        rates=[float(rate) for rate in learning_rates(settings)],
        rule=step_rule(settings, params),
        family=settings.loss,
        ignore_equal_captions=settings.equal_captions == "ignore",
        target_loss=config.target.loss,
    )
    start = Checkpoint(0, 0.0, run, params, buffers)
    for warm in rest:
        start = _warmed_up(small, start, warm, recipe, config)
    return SmallRun(small, start, data, target, recipe)


def _warmed_up(
    model: torch.nn.Module, start: Checkpoint, others: PairBatch, recipe: Recipe, config: Config
) -> Checkpoint:
    """The start of a run after `validation.warm_steps` of AdamW on other pairs, with Adam's moments for an AdamW run.

    Without them the first steps would be little more than signs of the gradient, unlike the later steps of any run.
    """
    validation = config.validation
    settings = TrainingSettings(
        steps=validation.warm_steps,
        batch_size=min(WARM_BATCH, len(others)),
        lr=validation.warm_lr,
        seed=config.seed + 1,
        run=start.run,
    )
    own = replace(
        recipe,
        order=torch.from_numpy(data_order(np.arange(len(others)), settings)),
        rates=[float(rate) for rate in learning_rates(settings)],
        rule=replace(
            recipe.rule,
            optimizer="adamw",
            weight_decay=decay_of_each(start.params, settings.weight_decay),
            grad_clip=None,
        ),
    )
    masks = torch.ones(1, len(others), dtype=next(iter(start.params.values())).dtype)
    reached: list[Checkpoint] = []

    def keep(step: int, params: Tree, first: Tree, second: Tree) -> None:
        if step == validation.warm_steps:
            reached.append(checkpoint_of(0, step, 0.0, params, first, second, start, own.rule))

    train_masked(model, start, others, masks, own, at_step=keep)
    (found,) = reached
    return replace(found, step=0, adam=found.adam if recipe.rule.optimizer == "adamw" else None)
