"""What scores on a subset of the parameters cost, and how they rank pairs against scores on all of them.

    python -m tests.benchmarks.subsets [--model digits-vit] [--steps 150] [--pairs 256] [--repeats 3]

One proxy run of three checkpoints. Costs are counted floating-point operations and seconds of scoring, per checkpoint,
as multiples of those of a bare forward pass over the same pairs, timed one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from pipeline.evaluation.flops import flop_counter
from pipeline.influence import Batches, Scorer, Settings, prepare_run
from pipeline.influence.parameters import chosen_names
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch
from tests.benchmarks.models import digit_pairs, small_model, trained_checkpoint

CHOICES = ("all", "last-2-blocks", "last-1-blocks", "projections")
ESTIMATORS = ("diff-in", "tracin", "unrolled")


def flops(function: Callable[[], object]) -> float:
    """Floating-point operations of a call."""
    with torch.no_grad(), flop_counter() as counter:
        function()
    return float(counter.get_total_flops())


def seconds(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    with torch.no_grad():
        function()
    return time.perf_counter() - start


def measured(
    model: PairModel,
    checkpoints: list[Checkpoint],
    batches: Batches,
    pairs: PairBatch,
    settings: Settings,
    repeats: int,
) -> tuple[np.ndarray, float, float]:
    """Scores of the pairs, and operations and time per checkpoint in bare forward passes."""
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=1000)
    scorer = Scorer(model, list(zip(checkpoints, plans, strict=True)), batches.reference, settings)

    def forward() -> object:
        with scorer.passes.ready():
            return model(pairs.images, pairs.tokens)

    def passes() -> list[Tensor]:
        near = scorer.neighbours(pairs)
        with scorer.passes.ready():
            return [part.score(pairs, near)[0] for part in scorer._parts[:-1]]  # the last one also gives the loss

    count = len(checkpoints) - 1
    ratios = [seconds(passes) / seconds(forward) / count for _ in range(repeats)]
    terms = scorer.score(pairs).terms.sum(1)
    return terms.double().numpy(), flops(passes) / flops(forward) / count, statistics.median(ratios)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits-vit")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = small_model(options.model)
    pool = digit_pairs(model, 1024)
    checkpoints = [trained_checkpoint(model, pool, options.steps * share // 3) for share in (1, 2, 3)]
    batches = Batches(pool[:64], pool[64:192], pool[192:320])
    pairs = pool[320 : 320 + options.pairs]
    print(f"{options.model}, checkpoints at thirds of {options.steps} AdamW steps, {options.pairs} pairs")
    print(f"{'estimator':10} {'parameters':14} {'number':>9} {'flops':>7} {'time':>7} {'Spearman':>9}")
    for estimator in ESTIMATORS:
        truth: np.ndarray | None = None
        for choice in CHOICES:
            settings = replace(Settings(), estimator=estimator, parameters=choice)  # type: ignore[arg-type]
            found, operations, took = measured(model, checkpoints, batches, pairs, settings, options.repeats)
            truth = found if truth is None else truth
            names = chosen_names(checkpoints[0].params, choice)
            number = sum(checkpoints[0].params[name].numel() for name in names)
            agreement = spearmanr(found, truth)[0]
            print(f"{estimator:10} {choice:14} {number:9,} {operations:7.2f} {took:7.2f} {agreement:9.3f}", flush=True)


if __name__ == "__main__":
    main()
