"""What the passes over B and V cost beside a training step: `python -m tests.benchmarks.directions [--models M ...]`.

For each model, processor seconds of one thread per 1,000 pairs: a step of the proxy's training (forward, backward,
AdamW) on a batch, then the mean loss's gradient and a Hessian-vector product over the same pairs, which is what the
directions of every estimator are made of. `medium` is a model of 27 million parameters at 112 px. Each repeat times all
three one after the other; medians, and the pairs per second of both passes as multiples of the step's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from pipeline.influence import Batches, Settings
from pipeline.influence.local import LocalView
from pipeline.models.clip import PairModel, split_state
from pipeline.replay.schedule import TrainingSettings
from pipeline.replay.train import InMemory, Trainer
from pipeline.types import Checkpoint
from tests.benchmarks.models import digit_pairs, medium_model, small_model


def taken(call: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(model: PairModel, batch_size: int, repeats: int) -> list[float]:
    """Seconds of a training step, a gradient and a Hessian product over a batch: medians."""
    pairs = digit_pairs(model, batch_size)
    settings = TrainingSettings(steps=2 * repeats + 2, batch_size=batch_size, lr=1e-4)
    order = np.tile(np.arange(batch_size), (settings.steps, 1))
    trainer = Trainer(model, InMemory(pairs), order, settings)
    trainer.advance()
    params, buffers = split_state(model)
    checkpoint = Checkpoint(1, 1e-4, 0, {k: v.detach().clone() for k, v in params.items()}, buffers)
    frozen = model.eval()
    view = LocalView(frozen, checkpoint, Batches(pairs, pairs, pairs), Settings())
    vector = view.gradient_loss.gradient(view.state)
    rows = [
        [
            taken(trainer.advance),
            taken(lambda: view.gradient_loss.gradient(view.state)),
            taken(lambda: view.gradient_loss.hessian_product(view.state, vector)),
        ]
        for _ in range(repeats)
    ]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-vit", "tiny-resnet", "medium"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"processor seconds per 1,000 pairs, batches of {options.batch}")
    print(f"{'model':12} {'step':>7} {'gradient':>9} {'Hessian':>8} {'rates of both, of the step':>28}")
    for name in options.models:
        model = medium_model() if name == "medium" else small_model(name)
        step, gradient, product = measured(model, options.batch, options.repeats)
        per = 1000 / options.batch
        ratios = f"{step / gradient:.2f} / {step / product:.2f}"
        print(f"{name:12} {per * step:7.2f} {per * gradient:9.2f} {per * product:8.2f} {ratios:>28}", flush=True)


if __name__ == "__main__":
    main()
