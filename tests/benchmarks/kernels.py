"""Where a GPU's time goes in a pass with tangents: its kernels, by what they are for and by name.

    python -m tests.benchmarks.kernels [--models ViT-B-32] [--precision bf16] [--batch 1024] [--tokens 77]
        [--forms tracin "diff-in central"] [--compiled] [--most 25]

Times are torch's profiler's, of one part of so many pairs after two that warm up; `pass` is the time from the first
call to the last kernel's end without the profiler, the median of five, and what it exceeds the kernels' sum by is
waiting.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.influence import Scorer, Settings
from pipeline.models.clip import build_model
from tests.benchmarks.passes import LIMITS, plans_of, random_pairs
from tests.benchmarks.timing import device_named, seconds, wait

#: Kinds of kernels, by what their names hold; the first that fits.
KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "gemv"),
    "attention": ("flash", "fmha", "attention"),
    "norms": ("norm",),
    "softmax": ("softmax",),
    "activations": ("gelu", "sigmoid", "silu"),
    "casts and copies": ("copy", "cat", "memcpy", "memset", "fill"),
    "fused": ("triton",),
}


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "others")


def kernels(work: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Calls and milliseconds of each kernel of a call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [event for event in found.key_averages() if event.device_type == cuda and not event.is_user_annotation]
    return {event.key: (event.count, event.self_device_time_total / 1e3) for event in events}


def main() -> None:
    """Print a table per model and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"])
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--forms", nargs="+", choices=list(LIMITS), default=["tracin", "diff-in central"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--most", type=int, default=25, help="kernels by name in a table")
    options = parser.parse_args()
    device = device_named("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in options.models:
        model = build_model(name).to(device)
        pairs, reference = (random_pairs(model, n, n, options.tokens).to(device) for n in (options.batch, 16))
        for form in options.forms:
            settings = Settings(precision=options.precision)
            begin = time.perf_counter()
            scorer = Scorer(
                model, plans_of(form, model), reference, settings, device, options.batch, compiled=options.compiled
            )
            with torch.no_grad(), scorer.passes.ready():
                work = partial(scorer._parts[0].score, pairs, scorer.neighbours(pairs))
                work()
                wait(device)
                start = time.perf_counter() - begin
                work()
                taken, found = seconds(work, device, 5), kernels(work)
            total = sum(ms for _, ms in found.values())
            what = f"{name}, {options.precision}, {form}, {options.batch} pairs{', compiled' * options.compiled}"
            print(f"\n{what}: pass {1e3 * taken:.1f} ms, {options.batch / taken:,.0f} pairs/s, ", end="")
            print(f"kernels {total:.1f} ms in {sum(n for n, _ in found.values()):,} calls; first pass {start:.1f} s\n")
            kinds: Counter[str] = Counter()
            for kernel, (_, ms) in found.items():
                kinds[kind_of(kernel)] += ms
            print("| kind | ms | share |\n|---|---|---|")
            for kind, ms in kinds.most_common():
                print(f"| {kind} | {ms:.2f} | {ms / total:.0%} |")
            print("\n| kernel | calls | ms |\n|---|---|---|")
            for kernel, (count, ms) in sorted(found.items(), key=lambda item: -item[1][1])[: options.most]:
                print(f"| {kernel[:110]} | {count} | {ms:.2f} |", flush=True)


if __name__ == "__main__":
    main()
