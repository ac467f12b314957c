"""What mixed precision does to the training of a proxy: its speed by model, and what the trained model is worth.

    python -m tests.benchmarks.training [--steps 400] [--seeds 3]

Speed: AdamW steps in float32 and in bfloat16 by turns, on noise. Worth: tiny-resnet trained on cifar10n-train of the
real pairs (10,000 photos, wrong captions and all) in either precision from the same seeds, zero-shot accuracy on half
of cifar10-test.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipeline.config import MAX_PIXELS
from pipeline.data.decode import Decoder
from pipeline.data.reader import read_shard
from pipeline.data.shards import expand
from pipeline.evaluation.zeroshot import load_held_out, measure
from pipeline.models.clip import PairModel, build_model
from pipeline.replay.schedule import TrainingSettings, data_order
from pipeline.replay.train import InMemory, Trainer
from pipeline.types import PairBatch
from tests.benchmarks.models import medium_model, small_model
from tests.benchmarks.needs import real_pairs
from tests.benchmarks.passes import random_pairs

PRECISIONS: list[Literal["fp32", "bf16"]] = ["fp32", "bf16"]

#: Models and the pairs of a step.
SIZES = {"digits-vit": 256, "tiny-vit": 256, "tiny-resnet": 256, "27M at 112 px": 64}


def trainer_of(model: PairModel, pairs: PairBatch, settings: TrainingSettings) -> Trainer:
    """Trains on these pairs."""
    return Trainer(model, InMemory(pairs), data_order(np.arange(len(pairs)), settings), settings)


def steps_per_second(name: str, batch: int, repeats: int) -> dict[str, float]:
    """Of each precision, the median over steps taken by turns."""
    trainers = []
    for precision in PRECISIONS:
        model = medium_model() if name.startswith("27M") else small_model(name)
        settings = TrainingSettings(steps=repeats + 1, batch_size=batch, lr=1e-4, precision=precision)
        trainers.append(trainer_of(model, random_pairs(model, batch, 1), settings))
    times: list[list[float]] = [[] for _ in PRECISIONS]
    for _ in range(repeats + 1):
        for trainer, taken in zip(trainers, times, strict=True):
            begin = time.perf_counter()
            trainer.advance()
            taken.append(time.perf_counter() - begin)
    return {p: 1 / statistics.median(taken[1:]) for p, taken in zip(PRECISIONS, times, strict=True)}


def accuracies(data: Path, steps: int, seeds: int) -> dict[str, list[float]]:
    """Zero-shot accuracy of each precision, by seed."""
    model = build_model("tiny-resnet")
    decoder = Decoder(model.image_spec, model.tokenize, MAX_PIXELS)
    urls = expand(str(data / "cifar10n-train/*.tar.gz"))
    pairs = PairBatch.cat([decoder.decode_shard(read_shard(url), 2).batch for url in urls])
    held_out = load_held_out(str(data / "cifar10-test/0000[0-4].tar.gz"), decoder, threads=2)
    settings = TrainingSettings(steps=steps, batch_size=128, lr=3e-3, equal_captions="ignore")
    found: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for seed in range(seeds):
        for precision in PRECISIONS:
            of_seed = replace(settings, precision=precision, run=seed)
            trainer = trainer_of(build_model("tiny-resnet", seed=seed), pairs, of_seed)
            for _ in range(steps):
                trainer.advance()
            found[precision].append(measure(trainer.model, held_out))
    return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| model | pairs per step | steps/s, float32 | bfloat16 | ratio |\n|---|---|---|---|---|")
    for name, batch in SIZES.items():
        rates = steps_per_second(name, batch, options.repeats)
        ratio = rates["bf16"] / rates["fp32"]
        print(f"| {name} | {batch} | {rates['fp32']:.3g} | {rates['bf16']:.3g} | {ratio:.2f} |", flush=True)
    print(f"\nzero-shot accuracy after {options.steps} steps, by seed")
    for precision, values in accuracies(real_pairs(), options.steps, options.seeds).items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{precision}: {statistics.mean(values):.3f} +- {spread:.3f} ({', '.join(f'{v:.3f}' for v in values)})")


if __name__ == "__main__":
    main()
