"""How far TracIn, and each way of computing Diff-In, is from its float64 value, by precision and step size.

    python -m tests.benchmarks.precision [--model tiny-vit] [--steps 60] [--pairs 128] [--factors 1e-3 1e-2 ...]

Each cell is the largest difference over the largest score, and Spearman's correlation. The factors multiply the step
that the rule chooses from norms for that precision (`LocalView.step_for`); the rule's own row is marked. `tf32` is
emulated on the CPU: what products of the passes take, where torch may use it, is rounded to its 10 bits of mantissa.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.influence.local import LocalView
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch
from tests.benchmarks.models import cast, digit_pairs, small_model, trained_checkpoint

#: Columns, and what `score.precision` is in them.
PRECISIONS: dict[str, Literal["fp32", "tf32", "bf16"]] = {
    "float64": "fp32", "float32": "fp32", "tf32": "tf32", "bfloat16": "bf16"
}  # fmt: skip

#: Places of the factors among the arguments of each product.
FACTORS = {
    "aten.mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.addmm.default": (1, 2),
    "aten.addmm_.default": (1, 2),
    "aten.baddbmm.default": (1, 2),
    "aten.baddbmm_.default": (1, 2),
    "aten.convolution.default": (0, 1),
    "mkldnn._linear_pointwise.default": (0, 1),
    "mkldnn._linear_pointwise.binary": (0, 2),
}


class Tf32(TorchDispatchMode):
    """Within this context products of float32 take their factors rounded to tf32, as on a GPU's matrix units."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(args)
        for place in FACTORS.get(str(func), ()) if torch.backends.cuda.matmul.allow_tf32 else ():
            if given[place].dtype == torch.float32:
                bits = given[place].contiguous().view(torch.int32)
                given[place] = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
        return func(*given, **(kwargs or {}))


def scores(model: PairModel, checkpoint: Checkpoint, batches: Batches, pairs: PairBatch, settings: Settings) -> Tensor:
    """The term of every pair, float64 `[b]`."""
    plan = prepare(model, checkpoint, batches, settings, dataset_size=1000, num_checkpoints=1)
    with Tf32() if settings.precision == "tf32" else nullcontext():
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
            chosen = replace(base, precision=PRECISIONS[precision], **settings)
            found = scores(*((double, exact) if wide else (single, trained)), batches, pairs, chosen)
            error = float((found - truth).abs().max() / truth.abs().max())
            return f"{error:.1e} / {spearmanr(found, truth)[0]:.4f}"

        print(f"\n{'SGD' if form == 'none' else 'AdamW'}")
        print(f"| form | step | {' | '.join(PRECISIONS)} |\n{'|---' * (2 + len(PRECISIONS))}|")
        narrow = list(PRECISIONS)[1:]
        print(f"| tracin | - | - | {' | '.join(cell(p, base=tracin) for p in narrow)} |", flush=True)
        print(f"| exact | - | - | {' | '.join(cell(p) for p in narrow)} |", flush=True)
        for method in ("central", "forward"):
            for factor in options.factors:
                with steps_times(factor):
                    cells = [cell(precision, method=method) for precision in PRECISIONS]
                label = "**rule**" if factor == 1 else f"x {factor:g}"
                print(f"| {method} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
