"""What cutting off the padding of captions saves: tokens computed per pair, and pairs per second of a tangent pass.

    python -m tests.benchmarks.captions --shards GLOB [--context 77] [--threads 1]

Three ways over the same pairs: the whole context; cut after the longest caption of each part of 32 in the order of the
shard; and the same with the pairs sorted by length within the shard, which is what `Scorer` does.
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
from torch import Tensor

from pipeline.config import MAX_PIXELS
from pipeline.data.decode import Decoder
from pipeline.data.reader import read_shard
from pipeline.influence import Settings
from pipeline.influence.passes import Passes, chunks
from pipeline.models.clip import split_state
from pipeline.types import PairBatch
from tests.benchmarks.models import medium_model
from tests.benchmarks.needs import real_pairs
from tests.benchmarks.passes import timed


def lengths(tokens: Tensor) -> Tensor:
    """Tokens of each caption, `[n]`."""
    return (tokens != 0).sum(1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="default: flickr1k of the real pairs")
    parser.add_argument("--context", type=int, default=77)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = medium_model(context_length=options.context)
    decoder = Decoder(model.image_spec, model.tokenize, MAX_PIXELS)
    url = sorted(glob.glob(options.shards or str(real_pairs() / "flickr1k/*.tar")))[0]
    shard = decoder.decode_shard(iter(read_shard(url))).batch
    params, buffers = split_state(model)
    passes, vectors = Passes(model, Settings()), {"v": {n: torch.randn_like(p) * 1e-3 for n, p in params.items()}}

    def run(pairs: PairBatch) -> None:
        with torch.no_grad(), passes.ready():
            for part in chunks(pairs, 32):
                passes.jet({**params, **buffers}, vectors, part, [("v",)])

    def whole(text: Tensor, normalize: bool = False) -> Tensor:
        features: Tensor = super(type(model), model).encode_text(text, normalize)  # open_clip's own
        return features

    ordered = shard[lengths(shard.tokens).argsort(stable=True)]
    ways: dict[str, tuple[PairBatch, Callable[[Tensor], int]]] = {
        "whole context": (shard, lambda tokens: tokens.shape[1]),
        "cut, order of the shard": (shard, lambda tokens: int(lengths(tokens).max())),
        "cut, sorted by length": (ordered, lambda tokens: int(lengths(tokens).max())),
    }
    run(shard[:32])
    print(f"{len(shard)} pairs, {float(lengths(shard.tokens).float().mean()):.1f} tokens per caption on average")
    for name, (pairs, computed) in ways.items():
        tokens = sum(computed(part.tokens) * len(part) for part in chunks(pairs, 32)) / len(pairs)
        with mock.patch.object(model, "encode_text", whole) if name.startswith("whole") else nullcontext():
            taken = timed(lambda pairs=pairs: run(pairs))
        print(f"{name:24} {tokens:6.1f} tokens per pair  {len(pairs) / taken:7.1f} pairs/s")


if __name__ == "__main__":
    main()
