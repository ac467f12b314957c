"""Decoding: pairs per CPU second of one thread, and what `data.draft` changes in pixels and in scores.

    python -m tests.benchmarks.decoding --shards GLOB [--sizes 48 112] [--enlarge 1] [--drafts 1 1.5 2] [--steps 200]

Rates: plain Pillow (open, resize, to RGB), open_clip's own transform, `Decoder` as it is, and with `data.draft` at
several values. `--enlarge N` has every JPEG made N times larger and encoded again first: for rates alone, where the
shards at hand hold small photos. Each repeat times all ways one after the other; the medians are printed.

Scores: a small ViT is trained briefly on the pairs with their exact pixels, and scores these pairs with exact pixels
and with those of `data.draft`; reference batch and target are the exact ones. Spearman of the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

import pipeline.models.compat  # noqa: F401  (before open_clip)
from pipeline.data.decode import Decoder
from pipeline.data.reader import Sample, read_shard
from pipeline.data.shards import expand
from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch
from tests.benchmarks.models import model_of, trained_checkpoint
from tests.benchmarks.needs import real_pairs

MAX_PIXELS = 64_000_000
ESTIMATORS = ("clip-score", "tracin", "diff-in")


def vit(size: int) -> PairModel:
    """A small ViT with images of that many pixels, of 8 x 8 patches."""
    config: dict[str, Any] = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": size, "patch_size": size // 8, "layers": 2, "width": 128, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    return model_of(config)


def enlarged(sample: Sample, times: int) -> Sample:
    """The sample with its JPEG that many times larger."""
    if times == 1 or sample.image is None:
        return sample
    image = Image.open(BytesIO(sample.image)).convert("RGB")
    encoded = BytesIO()
    image.resize((times * image.width, times * image.height)).save(encoded, "JPEG", quality=90)
    return replace(sample, image=encoded.getvalue())


def plain_pillow(samples: Sequence[Sample], model: PairModel) -> None:
    """Open, resize and convert each image, nothing else."""
    for sample in samples:
        assert sample.image is not None
        image = Image.open(BytesIO(sample.image)).resize(model.image_spec.size, Image.Resampling.BICUBIC)
        np.asarray(image.convert("RGB"))


def open_clip_transform(samples: Sequence[Sample], model: PairModel) -> None:
    """open_clip's evaluation transform of each image."""
    import open_clip

    spec = model.image_spec
    transform = open_clip.image_transform(spec.size, is_train=False, mean=spec.mean, std=spec.std)
    for sample in samples:
        assert sample.image is not None
        transform(Image.open(BytesIO(sample.image)))


def rates(ways: dict[str, Callable[[], object]], pairs: int, repeats: int) -> dict[str, float]:
    """Pairs per CPU second of each way, the median of the repeats."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            taken[name].append(time.process_time() - start)
    return {name: pairs / statistics.median(values) for name, values in taken.items()}


def scores(model: PairModel, checkpoint: Checkpoint, batches: Batches, pairs: PairBatch, estimator: str) -> Tensor:
    """The estimator's score of every pair, `[n]`."""
    settings = replace(Settings(), estimator=estimator)  # type: ignore[arg-type]
    plan = prepare(model, checkpoint, batches, settings, dataset_size=1000, num_checkpoints=1)
    found = Scorer(model, [(checkpoint, plan)], batches.reference, settings).score(pairs)
    return found.similarity if estimator == "clip-score" else found.terms[:, 0]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="default: flickr1k of the real pairs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 112])
    parser.add_argument("--enlarge", type=int, default=1)
    parser.add_argument("--drafts", type=float, nargs="+", default=[1, 1.5, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    read = [
        sample for url in expand(options.shards or str(real_pairs() / "flickr1k/*.tar")) for sample in read_shard(url)
    ]
    samples = [enlarged(sample, options.enlarge) for sample in read if sample.status == "ok"][: options.pairs]
    for size in options.sizes:
        model = vit(size)
        exact = Decoder(model.image_spec, model.tokenize, MAX_PIXELS)
        drafting = {
            draft: Decoder(model.image_spec, model.tokenize, MAX_PIXELS, draft=draft) for draft in options.drafts
        }

        ways: dict[str, Callable[[], object]] = {
            "plain Pillow": partial(plain_pillow, samples, model),
            "open_clip's transform": partial(open_clip_transform, samples, model),
            "exact": partial(exact.decode_shard, samples),
        }
        for draft in options.drafts:
            ways[f"draft {draft:g}"] = partial(drafting[draft].decode_shard, samples)
        sides = sorted(min(row.width, row.height) for row in exact.decode_shard(samples).rows)
        middle = sides[len(sides) // 2]
        print(f"{len(samples)} pairs to {size} px; shorter sides {sides[0]} to {sides[-1]}, median {middle}")
        for name, rate in rates(ways, len(samples), options.repeats).items():
            print(f"  {name:24} {rate:8.0f} pairs per CPU second", flush=True)
        if options.steps == 0:
            continue
        pairs = exact.decode_shard(samples).batch
        checkpoint = trained_checkpoint(model, pairs, options.steps)
        batches = Batches(pairs[:64], pairs[64:192], pairs[192:320])
        truth = {name: scores(model, checkpoint, batches, pairs[320:], name) for name in ESTIMATORS}
        for draft in options.drafts:
            other = drafting[draft].decode_shard(samples).batch
            differ = (other.images.int() - pairs.images.int()).abs()
            changed = differ.flatten(1).amax(1) > 0
            size_of_it = float(differ[changed].float().mean()) if changed.any() else 0.0
            words = [
                f"draft {draft:g}: {float(changed.float().mean()):.0%} of the images differ, by {size_of_it:.2f} of 255"
            ]
            for name in ESTIMATORS:
                found = scores(model, checkpoint, batches, other[320:], name)
                words.append(f"{name} {spearmanr(found, truth[name])[0]:.4f}")
            print("  " + "; ".join(words), flush=True)


if __name__ == "__main__":
    main()
