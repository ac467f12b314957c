"""What is decided before the first step of a run: its settings, the data order, the rates, the recorded steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config, ProxyConfig
from pipeline.errors import ConfigError
from pipeline.literals import EqualCaptions, Family, OptimizerName, Precision

Rows = NDArray[np.int64]

# Streams of random numbers of a run, so that a change of one leaves the others alone.
SUBSET, ORDER, CHECKPOINTS, CROPS, DROPOUT = range(5)


def generator(seed: int, run: int, *stream: int) -> np.random.Generator:
    """The random numbers of one stream of one run."""
    return np.random.default_rng([seed % 2**64, run, *stream])


@dataclass(frozen=True)
class TrainingSettings:
    """How a run is trained; with the pairs and the initial weights it decides every checkpoint.

    Attributes:
        steps: optimizer steps.
        batch_size: pairs per step, over all workers.
        loss: the contrastive loss.
        equal_captions: whether pairs of equal captions are each other's negatives.
        optimizer: `adamw`, or `sgd` with `momentum`.
        lr: peak learning rate.
        beta1, beta2, eps: AdamW's.
        momentum: SGD's.
        weight_decay: `theta *= 1 - lr * weight_decay` before the step, with either optimizer, for matrices.
        grad_clip: norm to which the gradient is clipped; None does not clip.
        warmup: share of the steps with a linearly rising rate.
        augment: train on random crops.
        precision: of the products; weights, sums, norms and losses are float32.
        seed: decides order, subset, crops and dropout, together with `run`.
        run: number of the run.
    """

    steps: int
    batch_size: int
    loss: Family = "clip"
    equal_captions: EqualCaptions = "negative"
    optimizer: OptimizerName = "adamw"
    lr: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    momentum: float = 0.0
    weight_decay: float = 0.1
    grad_clip: float | None = None
    warmup: float = 0.1
    augment: bool = False
    precision: Precision = "fp32"
    seed: int = 0
    run: int = 0

    @staticmethod
    def of(config: Config, pairs: int, run: int = 0) -> TrainingSettings:
        """The settings of a run on `pairs` pairs. Raises `ConfigError` where they do not fill a batch."""
        proxy = config.proxy
        if not pairs:
            raise ConfigError(
                "expected pairs with image and caption to train on, found none (`diffprune inspect` says why)",
                key="data.shards",
            )
        if pairs < proxy.batch_size:
            raise ConfigError(
                f"expected at most {pairs:,}, the pairs that a proxy run trains on",
                key="proxy.batch_size",
                found=proxy.batch_size,
            )
        _check_workers(proxy)
        steps = proxy.steps or max(1, round(proxy.epochs * (pairs // proxy.batch_size)))
        return TrainingSettings(
            steps=steps,
            batch_size=proxy.batch_size,
            loss=proxy.loss,
            equal_captions=config.reference.equal_captions,
            optimizer=proxy.optimizer,
            lr=proxy.lr,
            beta1=proxy.beta1,
            beta2=proxy.beta2,
            eps=proxy.eps,
            momentum=proxy.momentum,
            weight_decay=proxy.weight_decay,
            grad_clip=proxy.grad_clip,
            warmup=proxy.warmup,
            augment=proxy.augment,
            precision=proxy.precision,
            seed=config.seed,
            run=run,
        )


def learning_rates(settings: TrainingSettings) -> NDArray[np.float64]:
    """The rate that each step uses, `[steps]`: linear warm-up to the peak, then a half cosine towards zero.

    As in open_clip's trainer, so the last step's rate is small and never zero.
    """
    warm = round(settings.warmup * settings.steps)
    step = np.arange(settings.steps)
    rising = (step + 1) / max(warm, 1)
    falling = 0.5 * (1 + np.cos(math.pi * (step - warm) / max(settings.steps - warm, 1)))
    return np.asarray(settings.lr * np.where(step < warm, rising, falling), np.float64)


def runs_per_round(share: float) -> int:
    """Runs whose subsets complement each other; 0 for runs on all pairs.

    With a share of at most a half their subsets are disjoint; with a larger one each pair is left out by one of them.
    Shares count as rounded ones: 0.67 is two thirds.
    """
    if share >= 1:
        return 0
    return math.ceil(1 / (1 - share) - 0.05) if share > 0.5 else max(2, math.floor(1 / share + 0.05))


def runs_to_hold_out(share: float) -> int:
    """The fewest runs of which, for every pair, one did not train on it; 0 where no number of runs does."""
    return runs_per_round(share) if share > 0.5 else 2


def training_rows(available: Rows, share: float, seed: int, run: int) -> Rows:
    """The seeded share of the available cache rows that a run trains on, sorted.

    The runs of a round (`runs_per_round`) take windows of one random order, evenly shifted and closed to a ring, so
    that two runs of a half each train on complementary halves. Every round draws a new order.
    """
    if share >= 1:
        return np.sort(available)
    n, runs = len(available), runs_per_round(share)
    drawn = generator(seed, run // runs, SUBSET).permutation(available)
    size = min(math.floor(share * n), n - -(-n // runs) if share > 0.5 else n // runs)
    return np.sort(drawn[(np.arange(size) + run % runs * n // runs) % n])


def data_order(rows: Rows, settings: TrainingSettings) -> Rows:
    """The cache rows of every step, `[steps, batch_size]`.

    Each pass over the data is a permutation of its own; what does not fill a batch at its end is left out of it, so
    that no pair meets itself in a batch.
    """
    per_pass = len(rows) // settings.batch_size
    rng = generator(settings.seed, settings.run, ORDER)
    passes = [
        rng.permutation(rows)[: per_pass * settings.batch_size].reshape(per_pass, settings.batch_size)
        for _ in range(-(-settings.steps // per_pass))
    ]
    return np.concatenate(passes)[: settings.steps]


def recorded_steps(config: Config, settings: TrainingSettings) -> list[int]:
    """The steps after which a checkpoint is recorded, ascending, from 1 to `steps`. Raises `ConfigError`."""
    proxy, steps = config.proxy, settings.steps
    _check_recorded(proxy, steps)
    if isinstance(proxy.checkpoint_at, list):
        return sorted(proxy.checkpoint_at)
    count = proxy.num_checkpoints
    if proxy.checkpoint_at == "random":
        drawn = generator(settings.seed, settings.run, CHECKPOINTS).choice(steps, count, replace=False)
        return sorted(int(step) + 1 for step in drawn)
    return [round(steps * (i + 1) / count) for i in range(count)]


def check_schedule(proxy: ProxyConfig) -> None:
    """What of a schedule can be known to be wrong before the pairs are counted. Raises `ConfigError`."""
    _check_workers(proxy)
    if proxy.steps is not None:
        _check_recorded(proxy, proxy.steps)


def _check_workers(proxy: ProxyConfig) -> None:
    if proxy.batch_size % proxy.workers:
        raise ConfigError("expected a divisor of proxy.batch_size", key="proxy.workers", found=proxy.workers)


def _check_recorded(proxy: ProxyConfig, steps: int) -> None:
    at = proxy.checkpoint_at
    if isinstance(at, list):
        if max(at) > steps or len(set(at)) < len(at):
            raise ConfigError(f"expected different steps up to the run's {steps}", key="proxy.checkpoint_at", found=at)
    elif proxy.num_checkpoints > steps:
        raise ConfigError(
            f"expected at most the run's {steps} steps", key="proxy.num_checkpoints", found=proxy.num_checkpoints
        )
