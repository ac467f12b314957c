"""The training loop: one optimizer step at a time, each a function of the state, the step's number and the settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import StageError
from pipeline.influence.arithmetic import arithmetic, features_in
from pipeline.influence.losses import batch_loss, similar_captions
from pipeline.influence.transfers import to_device
from pipeline.models.checkpoint import excluded_from_decay
from pipeline.models.clip import PairModel
from pipeline.models.snapshot import checkpoint_of
from pipeline.replay.augment import crop_boxes, cropped
from pipeline.replay.schedule import DROPOUT, Rows, TrainingSettings, generator, learning_rates
from pipeline.replay.workers import Alone, Workers
from pipeline.types import Checkpoint, PairBatch


class Pairs(Protocol):
    """Decoded pairs by row (`pipeline.data.cache.PairCache`)."""

    @property
    def ids(self) -> NDArray[np.int64]:
        """The id of each pair, `[n]`."""

    def __len__(self) -> int: ...
    def batch(self, rows: NDArray[np.int64]) -> PairBatch:
        """The pairs at these rows, in that order."""


@dataclass(frozen=True)
class InMemory:
    """Pairs that are decoded and in memory (`Pairs`)."""

    pairs: PairBatch

    @property
    def ids(self) -> NDArray[np.int64]:
        """Of every pair, int64 `[n]`."""
        return self.pairs.ids.numpy()

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, rows: NDArray[np.int64]) -> PairBatch:
        """The pairs of those rows."""
        return self.pairs[torch.from_numpy(rows)]


def step_pairs(
    pairs: Pairs, order: Rows, settings: TrainingSettings, step: int, part: slice = slice(None), threads: int = 1
) -> PairBatch:
    """The pairs that the step from `step` to `step + 1` sees, cropped as they were; `part` of the batch alone."""
    batch = pairs.batch(np.asarray(order[step, part], np.int64))
    if settings.augment:
        size = (batch.images.shape[2], batch.images.shape[3])
        boxes = crop_boxes(settings.seed, settings.run, step, order.shape[1], size)[part]
        batch = PairBatch(cropped(batch.images, boxes, threads), batch.tokens, batch.ids, batch.captions)
    return batch


class Trainer:
    """A model in training.

    Args:
        model: starts from its weights as they are; moved to `device`.
        pairs: what it trains on.
        order: rows of every step, `[steps, batch_size]`.
        settings: everything else.
        device: where it computes.
        workers: the processes that share each batch.
    """

    def __init__(
        self,
        model: PairModel,
        pairs: Pairs,
        order: Rows,
        settings: TrainingSettings,
        device: torch.device | str = "cpu",
        workers: Workers | None = None,
    ) -> None:
        self.model = model.to(device)
        self.pairs = pairs
        self.order = order
        self.settings = settings
        self.device = torch.device(device)
        self.workers: Workers = workers or Alone()
        self.rates = learning_rates(settings)
        self.step = 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(self._parameters, settings)
        share = order.shape[1] // self.workers.size
        self._part = slice(self.workers.rank * share, (self.workers.rank + 1) * share)
        self._batches = self._batches_from(0)

    def advance(self) -> float:
        """Take one step; the batch's loss before it. Raises `StageError` when the loss is not finite."""
        with arithmetic(self.settings.precision):
            return self._advance()

    def _advance(self) -> float:
        batch = next(self._batches)
        with self._training_mode():
            forward = partial(self.model, batch.images, batch.tokens)
            features = features_in(self.settings.precision, self.device, forward)
            features, captions = self.workers.gather(features, batch.captions)
            equal = similar_captions(captions, captions, self.settings.equal_captions == "ignore")
            with arithmetic("fp32"):
                loss = batch_loss(features, equal, self.settings.loss)
        rate = float(self.rates[self.step])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._update(rate)
        # Only now, since it waits for the GPU; a step without a finite loss is never counted, so never recorded.
        if not math.isfinite(value := float(loss.detach())):
            raise self._divergence(f"loss is {value}", rate)
        self.step += 1
        return value

    def _batches_from(self, step: int) -> Iterator[PairBatch]:
        """What this worker's steps from `step` on see, on the device; on a GPU each made while the one before is taken.

        Without a reference to the trainer: the thread that makes them ends with it.
        """
        # On a CPU a step takes all of them: to make pairs beside it would cost both (0.72 times the steps, measured).
        threads = 1 if self.device.type == "cpu" else torch.get_num_threads()
        make = partial(step_pairs, self.pairs, self.order, self.settings, part=self._part, threads=threads)
        return to_device(map(make, range(step, len(self.order))), self.device)

    def _update(self, rate: float) -> None:
        parameters = list(self._parameters.values())
        for parameter in parameters:
            # A parameter that the loss does not reach decays and keeps a state like any other.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.workers.add_gradients(parameters)
        if self.settings.grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            if self.settings.optimizer == "sgd":
                with torch.no_grad():
                    for parameter in group["params"]:
                        parameter.mul_(1 - rate * group["decay"])
        self._optimizer.step()

    def checkpoint(self) -> Checkpoint:
        """A copy of the state on the CPU. Raises `StageError` when a parameter is not finite."""
        rate = float(self.rates[self.step - 1]) if self.step else 0.0
        if not all(bool(value.isfinite().all()) for value in self._parameters.values()):
            raise self._divergence("weights are not finite", rate)
        return checkpoint_of(self.model, self._optimizer, step=self.step, lr=rate, run=self.settings.run)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this run, as if it had never been interrupted."""
        self.model.load_state_dict(checkpoint.params | checkpoint.buffers)
        self._optimizer.state.clear()
        for name, parameter in self._parameters.items():
            if (adam := checkpoint.adam) is not None:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(adam.steps)),
                    "exp_avg": adam.exp_avg[name].to(self.device, copy=True),
                    "exp_avg_sq": adam.exp_avg_sq[name].to(self.device, copy=True),
                }
            elif checkpoint.momentum is not None:
                buffer = checkpoint.momentum[name].to(self.device, copy=True)
                self._optimizer.state[parameter] = {"momentum_buffer": buffer}
        self.step = checkpoint.step
        self._batches = self._batches_from(self.step)

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """`train()` mode with this step's own random numbers, where it differs from `eval()` at all."""
        if self.model.trains_as_it_evaluates:
            yield
            return
        settings = self.settings
        seed = int(generator(settings.seed, settings.run, DROPOUT, self.step, self.workers.rank).integers(2**63))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()

    def _divergence(self, what: str, rate: float) -> StageError:
        return StageError(
            f"the proxy's training diverged: run {self.settings.run}, step {self.step + 1} of {self.settings.steps}, "
            f"learning rate {rate:.3g}: {what}; lower proxy.lr, raise proxy.warmup or set proxy.grad_clip"
        )


def make_optimizer(parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW or SGD with open_clip's two groups: without and with weight decay.

    SGD's own `weight_decay` would be added to the gradient and so to the momentum; ours is applied by the trainer.
    """
    plain = [p for name, p in parameters.items() if excluded_from_decay(name, p)]
    decayed = [p for name, p in parameters.items() if not excluded_from_decay(name, p)]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )
    return torch.optim.SGD(
        [{"params": plain, "decay": 0.0}, {"params": decayed, "decay": settings.weight_decay}],
        lr=settings.lr,
        momentum=settings.momentum,
    )
