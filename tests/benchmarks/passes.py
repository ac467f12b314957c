"""What scoring costs in memory, as multiples of a bare forward pass of the same model over the same pairs.

    python -m tests.benchmarks.passes [--model ViT-B-32] [--batch 256] [--repeats 3] [--threads 2]
        [--forms "diff-in central" tracin] [--precision bf16] [--compiled]

The bare pass is open_clip's own forward under `no_grad` in `eval` mode, with torch's fused attention. Multiples are
taken of two of them: over all pairs of the batch at once, and the fastest to be had on a CPU, over parts of 32 with the
products of `pipeline.influence.dense`, which is not open_clip's own any more. With `--precision bf16` bare passes are
in bfloat16 too (autocast). `--compiled` times each form a second time, with compiled passes. A checkpoint's passes are
timed alone; the loss and similarity columns add one forward pass of each run's last checkpoint.
Each repeat times all forms one after the other and ratios are taken within a repeat, so that other load on the machine
falls on numerator and denominator alike; with `--threads 1` processor time is counted, not wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.influence import Probe, ProbePlan, Scorer, Settings
from pipeline.influence.passes import chunks
from pipeline.influence.tangents import TangentRules
from pipeline.models.clip import PairModel, split_state
from pipeline.types import Checkpoint, PairBatch, Tree
from tests.benchmarks.models import medium_model, small_model

Precision = Literal["fp32", "bf16"]

#: Forward passes that the flops of each form amount to.
LIMITS = {"tracin": 3, "tracin by losses": 2, "diff-in central": 6, "diff-in by losses": 4, "diff-in exact": 10}


#: Bare passes over parts of 32 pairs, by what they run in.
BARE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "parts of 32": nullcontext,
    "parts of 32, plain attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "parts of 32, plain attention, oneDNN": TangentRules,
}


def plan_of(form: str, params: Tree) -> ProbePlan:
    """One checkpoint's passes in one form, along random directions on all parameters."""
    generator = torch.Generator().manual_seed(0)
    ahead, behind = (("u", 1e-3),), (("u", -1e-3),)
    probes = {
        "tracin": [Probe(1.0, along=("u",))],
        "tracin by losses": [Probe(1.0, at=ahead), Probe(-1.0, at=behind)],
        "diff-in central": [Probe(1.0, along=("a",), at=ahead), Probe(-1.0, along=("b",), at=behind)],
        "diff-in by losses": [
            Probe(s * t, at=(("u", s * 1e-3), (name, t * 1e-3))) for s, name in ((1, "a"), (-1, "b")) for t in (1, -1)
        ],
        "diff-in exact": [Probe(1.0, along=("a",)), Probe(1.0, along=("u", "b"))],
    }[form]
    vectors = {
        vector: {name: torch.randn(value.shape, generator=generator) * 1e-3 for name, value in params.items()}
        for vector in ("u", "a", "b")[: 1 if form.startswith("tracin") else 3]
    }
    return ProbePlan(probes, vectors)


def plans_of(form: str, model: PairModel) -> list[tuple[Checkpoint, ProbePlan]]:
    """The model's weights as a checkpoint with that form's passes, before one that is asked for loss and similarity."""
    params, buffers = split_state(model)
    first, last = (Checkpoint(step, 0.1, 0, params, buffers) for step in (1, 2))
    return [(first, plan_of(form, params)), (last, ProbePlan([]))]


def random_pairs(model: PairModel, count: int, seed: int, length: int | None = None) -> PairBatch:
    """Noise with captions of so many tokens; by default of full length, for which none can be cut off."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *model.image_spec.size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (count, model.context_length), generator=generator)
    end = (length or model.context_length) - 1
    tokens[:, end] = 49407
    tokens[:, end + 1 :] = 0
    ids = torch.arange(count) + 10_000 * seed
    return PairBatch(images, tokens, ids, ids)


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call: with one thread those of the processor, which other load on the machine changes little."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def measure(
    name: str | None, batch: int, repeats: int, forms: Sequence[str], precision: Precision, compiled: bool = False
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the bare passes, and of each form's passes, one number per repeat."""
    model = small_model(name) if name else medium_model()
    pairs, reference = random_pairs(model, batch, 1), random_pairs(model, 16, 2)
    settings = Settings(precision=precision)
    scorers = {
        f"{form}, compiled" if kind else form: Scorer(model, plans_of(form, model), reference, settings, compiled=kind)
        for form in forms
        for kind in ((False, True) if compiled else (False,))
    }
    bare: dict[str, list[float]] = {name: [] for name in (f"batch {batch}", *BARE)}
    found: dict[str, list[float]] = {name: [] for name in scorers}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, times in bare.items():
                parts = list(chunks(pairs, batch if name.startswith("batch") else 32))
                lower = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
                with BARE.get(name, nullcontext)(), lower:
                    times.append(timed(lambda parts=parts: [model(part.images, part.tokens) for part in parts]))
            for name, scorer in scorers.items():
                with scorer.passes.ready():
                    near = scorer.neighbours(pairs)
                    found[name].append(timed(lambda s=scorer, n=near: s._parts[0].score(pairs, n)))
    # The first round only warms up.
    bare, found = ({name: times[1:] for name, times in kind.items()} for kind in (bare, found))
    return bare, found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="as `proxy.model`; default: 27M parameters at 112 px")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--forms", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bare, found = measure(
        options.model, options.batch, options.repeats, options.forms, options.precision, options.compiled
    )
    for name, seconds in bare.items():
        print(f"bare forward pass, {name}: {options.batch / statistics.median(seconds):.0f} pairs/s")
    whole, fastest = bare[f"batch {options.batch}"], list(bare.values())[-1]
    print(f"{'form':27} {'limit':>6}  multiple of the pass at batch {options.batch}, and of the fastest (range)")
    for name, seconds in found.items():
        columns = []
        for base in (whole, fastest):
            ratios = [s / b for s, b in zip(seconds, base, strict=True)]
            columns.append(f"{statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rate = options.batch / statistics.median(seconds)
        print(f"{name:27} {LIMITS[name.split(',')[0]]:6d}  " + "  ".join(columns) + f"  {rate:.4g} pairs/s")


if __name__ == "__main__":
    main()
