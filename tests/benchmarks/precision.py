"""How far TracIn, and each way of computing Diff-In, is from its float64 value, by precision and step size.

    python -m tests.benchmarks.precision [--model tiny-vit] [--steps 60] [--pairs 128] [--factors 1e-3 1e-2 ...]

Each cell is the largest difference over the largest score, and Spearman's correlation. The factors multiply the step
that the rule chooses from norms for that precision (`LocalView.step_for`); the rule's own row is marked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor

from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.influence.local import LocalView
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch
from tests.benchmarks.models import cast, digit_pairs, small_model, trained_checkpoint

PRECISIONS = ("float64", "float32", "bfloat16")


def scores(model: PairModel, checkpoint: Checkpoint, batches: Batches, pairs: PairBatch, settings: Settings) -> Tensor:
    """The term of every pair, float64 `[b]`."""
    plan = prepare(model, checkpoint, batches, settings, dataset_size=1000, num_checkpoints=1)
    return Scorer(model, [(checkpoint, plan)], batches.reference, settings).score(pairs).terms[:, 0].double()


@contextmanager
def steps_times(factor: float) -> Iterator[None]:
    """Within this context every step is that multiple of the rule's."""
    rule = LocalView.step_for

    def scaled(view: LocalView, vector: dict[str, Tensor], order: int) -> float:
        return factor * rule(view, vector, order)

    LocalView.step_for = scaled  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalView.step_for = rule  # type: ignore[method-assign]


def main() -> None:
    """Print a table for SGD's form and one for AdamW's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-vit")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--factors", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2])
    options = parser.parse_args()
    single, double = (small_model(options.model, dtype) for dtype in (torch.float32, torch.float64))
    pool = digit_pairs(single, 512 + options.pairs)
    trained = trained_checkpoint(single, pool[:512], options.steps)
    exact = cast(trained, torch.float64)
    batches, pairs = Batches(pool[:64], pool[64:192], pool[192:320]), pool[512:]
    print(f"{options.model}, {options.steps} AdamW steps, {options.pairs} pairs: relative error / Spearman to float64")
    forms: list[Literal["none", "adam"]] = ["none", "adam"]
    for form in forms:
        base = Settings(method="exact", precondition=form)
        tracin = replace(base, estimator="tracin")
        truths = {chosen.estimator: scores(double, exact, batches, pairs, chosen) for chosen in (base, tracin)}

        def cell(precision: str, truths: dict[str, Tensor] = truths, base: Settings = base, **settings: Any) -> str:
            wide, truth = precision == "float64", truths[base.estimator]
            chosen = replace(base, precision="bf16" if precision == "bfloat16" else "fp32", **settings)
            found = scores(*((double, exact) if wide else (single, trained)), batches, pairs, chosen)
            error = float((found - truth).abs().max() / truth.abs().max())
            return f"{error:.1e} / {spearmanr(found, truth)[0]:.4f}"

        print(f"\n{'SGD' if form == 'none' else 'AdamW'}")
        print(f"| form | step | {' | '.join(PRECISIONS)} |\n|---|---|---|---|---|")
        print(f"| tracin | - | - | {' | '.join(cell(p, base=tracin) for p in PRECISIONS[1:])} |", flush=True)
        print(f"| exact | - | - | {' | '.join(cell(p) for p in PRECISIONS[1:])} |", flush=True)
        for method in ("central", "forward"):
            for factor in options.factors:
                with steps_times(factor):
                    cells = [cell(precision, method=method) for precision in PRECISIONS]
                label = "**rule**" if factor == 1 else f"x {factor:g}"
                print(f"| {method} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
