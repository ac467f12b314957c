"""How near scoring comes to what a GPU can do, by model, batch size and precision: one table.

    python -m tests.benchmarks.gpu [--models ViT-B-32 ViT-B-16] [--batch 64 256 1024] [--precisions bf16 tf32 fp32]
        [--pairs 1024] [--tokens 77] [--seconds 3] [--device cuda] [--compiled]

Random images and captions of so many tokens (default: of full length), on the device before the clock starts; weights
and directions are random, and of one checkpoint. `forward`: open_clip's pass with its fused attention, pairs per
second. `tracin` and `diff-in` (central): pairs times checkpoints per second. `share`: their useful operations, 3 and 6
times those counted in a forward pass, against the rate of a product of large square matrices measured here in the same
precision. `GB`: the most that tensors took during the passes, and of it, in brackets, what came on top of weights,
directions and pairs. Needs neither Ray nor shards. `--device cpu` with a small model only shows that the script works.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from pipeline.errors import InputError
from pipeline.evaluation.flops import flop_counter
from pipeline.influence import Scorer, Settings
from pipeline.influence.arithmetic import arithmetic
from pipeline.influence.passes import chunks, pass_size
from pipeline.models.clip import PairModel, build_model
from pipeline.types import PairBatch
from tests.benchmarks.passes import LIMITS, plans_of, random_pairs
from tests.benchmarks.timing import device_named, wait

FORMS = {"tracin": "tracin", "diff-in": "diff-in central"}

#: Rows and columns of the matrices whose product is timed, by kind of device.
SIZE = {"cuda": 8192, "cpu": 512}

HEAD = ["model", "precision", "matrix TFlop/s", "batch", "forward", *(c for f in FORMS for c in (f, "share", "GB"))]


def rate(work: Callable[[], object], amount: float, seconds: float, device: torch.device) -> float:
    """`amount` per second of a call, after one call that warms up."""
    work()
    wait(device)
    calls, begin = 0, time.perf_counter()
    while not calls or time.perf_counter() - begin < seconds:
        work()
        calls += 1
        wait(device)
    return amount * calls / (time.perf_counter() - begin)


def matrix_rate(precision: str, seconds: float, device: torch.device) -> float:
    """Operations per second of a product of square matrices."""
    size = SIZE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with arithmetic(precision):
        return rate(lambda: left @ right, 2.0 * size**3, seconds, device)


def forward_flops(model: PairModel, pairs: PairBatch) -> float:
    """Operations of a forward pass, per pair."""
    few = pairs[:8]
    with torch.no_grad(), flop_counter() as counter:
        model(few.images, few.tokens)
    return counter.get_total_flops() / len(few)


def rows(name: str, options: argparse.Namespace, device: torch.device) -> list[list[str]]:
    """The rows of one model."""
    model = build_model(name).to(device)
    pairs, reference = (random_pairs(model, n, n, options.tokens).to(device) for n in (options.pairs, 16))
    plans = {form: plans_of(form, model) for form in FORMS.values()}
    flops = forward_flops(model, pairs)
    found: list[list[str]] = []
    for precision in options.precisions:
        peak = matrix_rate(precision, options.seconds, device)
        for batch in options.batch:
            row = [name, precision, f"{peak / 1e12:.4g}", str(batch)]
            row += _or_why_not(partial(_forward, model, pairs, precision, batch, options, device), 1)
            for form in FORMS.values():
                settings = Settings(precision=precision)
                cost = LIMITS[form] * flops / peak
                scorer = partial(
                    Scorer, model, plans[form], reference, settings, device, batch, compiled=options.compiled
                )
                row += _or_why_not(partial(_passes, scorer, pairs, cost, options, device), 3)
            found.append(row)
            print(f"# {' '.join(row)}", flush=True)
    return found


def _forward(
    model: PairModel, pairs: PairBatch, precision: str, batch: int, options: argparse.Namespace, device: torch.device
) -> list[str]:
    """Pairs per second of open_clip's own pass."""
    lower = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    parts = list(chunks(pairs, pass_size(batch, model, pairs)))
    with torch.no_grad(), arithmetic(precision), lower:
        found = rate(lambda: [model(p.images, p.tokens) for p in parts], len(pairs), options.seconds, device)
    return [f"{found:.4g}"]


def _passes(
    make: Callable[[], Scorer], pairs: PairBatch, cost: float, options: argparse.Namespace, device: torch.device
) -> list[str]:
    """Pairs times checkpoints per second, the share of the machine's rate, and memory.

    Args:
        make: gives the scorer; it may not fit into memory.
        pairs: on the device.
        cost: seconds of a pair's useful operations at the machine's rate.
    """
    scorer = make()
    before = _used(device)
    with torch.no_grad(), scorer.passes.ready():
        near = scorer.neighbours(pairs)
        batch = scorer.batch_size
        found = rate(lambda: scorer._parts[0].score(pairs, near), len(pairs), options.seconds, device)
    if scorer.batch_size < batch:
        raise torch.OutOfMemoryError(f"passes of {batch} pairs were halved")
    if before is None:
        return [f"{found:.4g}", f"{found * cost:.0%}", "-"]
    most = torch.cuda.max_memory_allocated(device)
    return [f"{found:.4g}", f"{found * cost:.0%}", f"{most / 1e9:.1f} ({(most - before) / 1e9:.1f})"]


def _or_why_not(work: Callable[[], list[str]], columns: int) -> list[str]:
    """What it finds, or the same number of columns that say why not: it does not fit, or the compiler refuses it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return ["too large"] + ["-"] * (columns - 1)
    except InputError as error:
        print(f"# {error}", flush=True)
        return ["not compiled"] + ["-"] * (columns - 1)


def _used(device: torch.device) -> int | None:
    """Bytes of tensors on the GPU; the peak counts from here."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "tf32", "fp32"], choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiled", action="store_true", help="compile the passes of tracin and diff-in")
    options = parser.parse_args()
    device = device_named(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = [row for model in options.models for row in rows(model, options, device)]
    print(f"\n{name}, torch {torch.__version__}, {options.pairs} pairs\n")
    for row in [HEAD, ["---"] * len(HEAD), *found]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
