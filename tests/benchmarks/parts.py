"""How many pairs a pass on a CPU should have, by model: pairs per processor second of one thread.

    python -m tests.benchmarks.parts [--models M ...] [--sizes 16 32 ...] [--pairs 512] [--repeats 3]

For passes of each size the gradient of a mean loss, a Hessian product, a forward pass (`clip-score`), one tangent
(`tracin`), Eq. 9 (`diff-in`), and 16 tangents at once (`tracin-self`); the best of the repeats. `pass_size` says what a
model gets. `medium` has 27 million parameters at 112 px, with a quarter of the pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from pipeline.influence import Batches, Scorer, Settings, passes, prepare
from pipeline.influence.local import LocalView
from pipeline.models.clip import PairModel, split_state
from pipeline.types import Checkpoint
from tests.benchmarks.models import digit_pairs, medium_model, small_model

FORMS = ("clip-score", "tracin", "diff-in", "tracin-self")


def rate(work: Callable[[], object], pairs: int, repeats: int) -> float:
    """Pairs per processor second, the best of the repeats."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return pairs / best


def rates(model: PairModel, count: int, size: int, repeats: int) -> Iterator[float]:
    """The columns of one row."""
    pairs = digit_pairs(model, count)
    params, buffers = split_state(model)
    checkpoint = Checkpoint(1, 1e-4, 0, {name: value.detach().clone() for name, value in params.items()}, buffers)
    batches, few = Batches(pairs[:64], pairs, pairs[:64]), Batches(pairs[:64], pairs[:64], pairs[:64])
    passes._cpu_pairs[model] = size
    view = LocalView(model, checkpoint, batches, Settings())
    vector = view.gradient_loss.gradient(view.state)
    yield rate(partial(view.gradient_loss.gradient, view.state), count, repeats)
    yield rate(partial(view.gradient_loss.hessian_product, view.state, vector), count, repeats)
    for form in FORMS:
        settings = Settings(estimator=form, projections=16)  # type: ignore[arg-type]
        plan = prepare(model, checkpoint, few, settings, dataset_size=1000, num_checkpoints=1)
        scorer = Scorer(model, [(checkpoint, plan)], batches.reference, settings)
        yield rate(partial(scorer.score, pairs), count, repeats)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits-vit", "tiny-resnet", "tiny-vit", "medium"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| model | pairs in a pass | gradient | Hessian product | {' | '.join(FORMS)} |")
    print("|---" * (4 + len(FORMS)) + "|")
    for name in options.models:
        model = (medium_model() if name == "medium" else small_model(name)).eval()
        count = options.pairs // 4 if name == "medium" else options.pairs
        chosen = passes.pass_size(1024, model, digit_pairs(model, 1))
        for size in options.sizes:
            cells = [f"{value:.0f}" for value in rates(model, count, size, options.repeats)]
            label = f"**{size}**" if size == chosen else str(size)
            print(f"| {name} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
