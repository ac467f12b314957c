"""What scoring costs in memory, as multiples of a bare forward pass of the same model over the same pairs.

    python -m tests.benchmarks.passes [--batch 256] [--repeats 3] [--threads 1]

A checkpoint's passes are timed alone; the loss and similarity columns add one forward pass of each run's last
checkpoint. Each repeat times all forms one after the other and ratios are taken within a repeat, so that other load on
the machine falls on numerator and denominator alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.func import functional_call

from pipeline.influence import Probe, ProbePlan, Scorer, Settings
from pipeline.models.clip import PairModel, build_model, split_state
from pipeline.types import Checkpoint, PairBatch, Tree

#: 27M parameters at 112 px: 50 image tokens, 32 text tokens.
MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "layers": 6, "width": 384, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}

#: Forward passes that the flops of each form amount to.
LIMITS = {"tracin": 3, "tracin by losses": 2, "diff-in central": 6, "diff-in by losses": 4, "diff-in exact": 10}


def plans(params: Tree) -> dict[str, ProbePlan]:
    """One checkpoint's passes in each form, along random directions on all parameters."""
    generator = torch.Generator().manual_seed(0)

    def vector() -> Tree:
        return {name: torch.randn(value.shape, generator=generator) * 1e-3 for name, value in params.items()}

    ahead, behind = (("u", 1e-3),), (("u", -1e-3),)
    return {
        "tracin": ProbePlan([Probe(1.0, along=("u",))], {"u": vector()}),
        "tracin by losses": ProbePlan([Probe(1.0, at=ahead), Probe(-1.0, at=behind)], {"u": vector()}),
        "diff-in central": ProbePlan(
            [Probe(1.0, along=("a",), at=ahead), Probe(-1.0, along=("b",), at=behind)],
            {"u": vector(), "a": vector(), "b": vector()},
        ),
        "diff-in by losses": ProbePlan(
            [
                Probe(s * t, at=(("u", s * 1e-3), (name, t * 1e-3)))
                for s, name in ((1, "a"), (-1, "b"))
                for t in (1, -1)
            ],
            {"u": vector(), "a": vector(), "b": vector()},
        ),
        "diff-in exact": ProbePlan(
            [Probe(1.0, along=("a",)), Probe(1.0, along=("u", "b"))], {"u": vector(), "a": vector(), "b": vector()}
        ),
    }


def random_pairs(model: PairModel, count: int, seed: int) -> PairBatch:
    """Noise with captions of full length, for which no token can be cut off."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *model.image_spec.size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (count, model.context_length), generator=generator)
    tokens[:, -1] = 49407
    ids = torch.arange(count) + 10_000 * seed
    return PairBatch(images, tokens, ids, ids)


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(batch: int, repeats: int) -> dict[str, list[float]]:
    """Ratios to the bare forward pass by form, one per repeat; and the passes' seconds under `forward`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.json")
        path.write_text(json.dumps(MODEL))
        model = build_model(str(path))
    params, buffers = split_state(model)
    checkpoint, later = Checkpoint(1, 0.1, 0, params, buffers), Checkpoint(2, 0.1, 0, params, buffers)
    pairs, reference = random_pairs(model, batch, 1), random_pairs(model, 16, 2)
    nothing = ProbePlan([])
    scorers = {
        name: Scorer(model, [(checkpoint, plan), (later, nothing)], reference, Settings())
        for name, plan in plans(params).items()
    }
    found: dict[str, list[float]] = {"forward": []} | {name: [] for name in scorers}
    with torch.no_grad():
        functional_call(model, {**params, **buffers}, (pairs.images[:8], pairs.tokens[:8]))
        for _ in range(repeats):
            bare = timed(lambda: functional_call(model, {**params, **buffers}, (pairs.images, pairs.tokens)))
            found["forward"].append(bare)
            for name, scorer in scorers.items():
                with scorer.passes.ready():
                    near = scorer.neighbours(pairs)
                    found[name].append(timed(lambda s=scorer, n=near: s._parts[0].score(pairs, n)) / bare)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.batch, options.repeats)
    seconds = found.pop("forward")
    print(f"bare forward pass: {options.batch / statistics.median(seconds):.0f} pairs/s, batch {options.batch}")
    print(f"{'form':20} {'ratio':>6} {'limit':>6} {'of limit':>9}  (lowest and highest)")
    for name, ratios in found.items():
        middle, limit = statistics.median(ratios), LIMITS[name]
        print(f"{name:20} {middle:6.2f} {limit:6d} {middle / limit:9.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
