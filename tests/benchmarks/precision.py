"""How far each way of computing Diff-In is from its float64 value, by precision and step size.

    python -m tests.benchmarks.precision [--model tiny-vit] [--steps 60] [--pairs 128]

Relative error is the largest difference over the largest score; the factors multiply the step that the rule chooses.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from scipy.stats import spearmanr
from torch import Tensor

from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.influence.local import LocalView
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch
from tests.benchmarks.models import cast, digit_pairs, small_model, trained_checkpoint

FACTORS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)


def scores(model: PairModel, checkpoint: Checkpoint, batches: Batches, pairs: PairBatch, settings: Settings) -> Tensor:
    """Diff-In's term of every pair, float64 `[b]`."""
    plan = prepare(model, checkpoint, batches, settings, dataset_size=1000, num_checkpoints=1)
    return Scorer(model, [(checkpoint, plan)], batches.reference, settings).score(pairs).terms[:, 0].double()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-vit")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=128)
    options = parser.parse_args()
    single, double = (small_model(options.model, dtype) for dtype in (torch.float32, torch.float64))
    pool = digit_pairs(single, 512 + options.pairs)
    trained = trained_checkpoint(single, pool[:512], options.steps)
    exact = cast(trained, torch.float64)
    batches, pairs = Batches(pool[:64], pool[64:192], pool[192:320]), pool[512:]
    rule = LocalView.step_for
    print(f"{options.model}, {options.steps} AdamW steps, {options.pairs} pairs: relative error / Spearman to float64")
    for form in ("none", "adam"):
        base = Settings(method="exact", precondition=form)  # type: ignore[arg-type]
        truth = scores(double, exact, batches, pairs, base)

        def show(label: str, settings: Settings, wide: bool = False, truth: Tensor = truth, form: str = form) -> None:
            model, checkpoint = (double, exact) if wide else (single, trained)
            found = scores(model, checkpoint, batches, pairs, settings)
            error = float((found - truth).abs().max() / truth.abs().max())
            print(f"{form:5} {label:32} {error:9.1e}  {spearmanr(found, truth)[0]:7.4f}", flush=True)

        for precision in ("fp32", "bf16"):
            show(f"exact {precision}", replace(base, precision=precision))  # type: ignore[arg-type]
        for method in ("central", "forward"):
            show(f"{method} fp64", replace(base, method=method), wide=True)  # type: ignore[arg-type]
            show(f"{method} bf16", replace(base, method=method, precision="bf16"))  # type: ignore[arg-type]
            for factor in FACTORS:

                def scaled_rule(
                    view: LocalView, vector: dict[str, Tensor], order: int, factor: float = factor
                ) -> float:
                    return factor * rule(view, vector, order)

                LocalView.step_for = scaled_rule  # type: ignore[method-assign, assignment]
                show(f"{method} fp32 step x {factor:g}", replace(base, method=method))  # type: ignore[arg-type]
            LocalView.step_for = rule  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
