"""Cleaning where the truth is made: captions swapped at random among real pairs, found again, and retrained without.

    python -m tests.benchmarks.swapped [--share 0.3] [--held-out 200] [--out FOLDER] [--set a.b=c ...]

It takes `flickr1k` of the folder in `DIFFPRUNE_TEST_DATA`; the target is held out of the same pairs, swapped ones too.
The last pairs are kept out of all of it, with their own captions: models trained on each choice are measured on them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.cli import invoke
from pipeline.data.reader import Sample, read_shard
from pipeline.data.shards import expand
from tests.benchmarks.needs import real_pairs
from tests.helpers import sample_members, write_tar

CONFIG = """
target: {{kind: holdout, pairs: 128}}
data: {{shards: "{shards}"}}
reference: {{pairs: 128, gradient_pairs: 256}}
proxy: {{model: tiny-resnet, runs: 4, subset: 0.5, steps: 200, batch_size: 128, lr: 1.0e-3, augment: true}}
score: {{estimator: tracin, held_out: true}}
select: {{keep: {keep}, by: rank(utility) + rank(similarity)}}
report: {{gallery: 4}}
evaluate:
  shards: "{held_out}"
  truth: "{truth}"
  baselines: [full, random, clip-score, right-only]
  compare:
    tracin alone: {{by: utility}}
    loss: {{by: -loss}}
"""


def swap(samples: Sequence[Sample], share: float, seed: int, folder: Path) -> tuple[str, str]:
    """Write the samples with the captions of a random share of them handed on; the tar, and the truth as CSV."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(samples))[: round(share * len(samples))]
    source = np.arange(len(samples))
    source[chosen] = np.roll(chosen, 1)
    members = []
    lines = ["uid,clean,caption_class"]
    for number, sample in enumerate(samples):
        caption = samples[source[number]].caption
        members += sample_members(f"{number:08d}", sample.image, caption, {"uid": sample.uid})
        lines.append(f"{sample.uid},{number},{number if caption == sample.caption else source[number]}")
    truth = folder / "truth.csv"
    truth.write_text("\n".join(lines) + "\n")
    return write_tar(folder / "00000.tar", members), str(truth)


def keep_out(samples: Sequence[Sample], folder: Path) -> str:
    """Write the samples as they are; the tar."""
    members = []
    for number, sample in enumerate(samples):
        members += sample_members(f"{number:08d}", sample.image, sample.caption, {"uid": sample.uid})
    return write_tar(folder / "held-out.tar", members)


def main() -> int:
    """Make the pairs and run the job on them; its table says how well wrong captions are found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    data = real_pairs()
    samples = [sample for url in expand(str(data / "flickr1k" / "*.tar")) for sample in read_shard(url)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        trained = len(samples) - options.held_out
        shards, truth = swap(samples[:trained], options.share, options.seed, folder)
        held_out = keep_out(samples[trained:], folder)
        config = folder / "config.yaml"
        keep = 1 - options.share
        config.write_text(CONFIG.format(shards=shards, truth=truth, held_out=held_out, keep=keep))
        changes = [word for change in options.set for word in ("--set", change)]
        return invoke(["run", str(config), "--out", str(folder / "run"), *changes])


if __name__ == "__main__":
    raise SystemExit(main())
