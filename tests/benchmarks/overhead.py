"""What a tangent pass costs besides its arithmetic: the calls of Python and torch, which a GPU waits for.

    python -m tests.benchmarks.overhead [--repeats 20]

A model with the depth of ViT-B-32 (12 blocks of image, 12 of text) whose layers are so narrow that their arithmetic
takes next to nothing, two pairs at a time, one thread. `calls`: operators that reach torch's dispatcher. On a GPU a
pass cannot take less than these milliseconds, so the pairs of a pass must be so many that they take longer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.influence import Scorer, Settings
from tests.benchmarks.models import model_of
from tests.benchmarks.passes import plans_of, random_pairs

NARROW = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 12, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 12},
}

PRECISIONS: list[Literal["fp32", "bf16"]] = ["fp32", "bf16"]


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def measured(work: Callable[[], object], repeats: int) -> tuple[float, int]:
    """Milliseconds of a call, and its operators."""
    work()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    taken = (time.perf_counter() - begin) / repeats
    with Calls() as calls:
        work()
    return 1e3 * taken, calls.count


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(NARROW)
    pairs, reference = random_pairs(model, 2, 1), random_pairs(model, 16, 2)
    with torch.no_grad():
        rows = [("forward", "fp32", *measured(lambda: model(pairs.images, pairs.tokens), options.repeats))]
    for precision in PRECISIONS:
        for form in ("tracin", "diff-in central"):
            scorer = Scorer(model, plans_of(form, model), reference, Settings(precision=precision))
            with torch.no_grad(), scorer.passes.ready():
                near = scorer.neighbours(pairs)
                found = measured(lambda s=scorer, n=near: s._parts[0].score(pairs, n), options.repeats)  # type: ignore[misc]
            rows.append((form, precision, *found))
    print("| passes | precision | ms | calls |\n|---|---|---|---|")
    for name, precision, taken, calls in rows:
        print(f"| {name} | {precision} | {taken:.1f} | {calls:,} |")


if __name__ == "__main__":
    main()
