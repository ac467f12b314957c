"""Reads and decodes the pairs at given positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.data.decode import Decoder
from pipeline.data.inventory import ShardInfo
from pipeline.data.positions import Positions, by_shard
from pipeline.data.reader import Sample
from pipeline.data.samples import Places, samples_at
from pipeline.types import PairBatch


def load_pairs(
    inventory: Sequence[ShardInfo],
    positions: Positions,
    decoder: Decoder,
    caption: str,
    threads: int = 1,
    prompt: str = "{}",
    places: Places | None = None,
) -> tuple[PairBatch, Positions]:
    """Decode the pairs at `positions` (all different); bad ones are left out.

    Captions take the place of the `{}` in `prompt`; `places` as for `samples_at`. Returns the batch and the position of
    each of its pairs, both in the order asked for.
    """
    positions = np.asarray(positions, np.int64)
    order = np.argsort(positions, kind="stable")
    ascending = positions[order]
    if np.any(ascending[1:] == ascending[:-1]):
        raise ValueError("positions must all be different")
    batches = [decoder.decode_shard([]).batch]
    found: list[Positions] = []
    done = 0
    for info, _, indices in by_shard(inventory, ascending):
        samples = (_prompted(sample, prompt) for sample in samples_at(info, indices, caption, places))
        decoded = decoder.decode_shard(samples, threads)
        batches.append(decoded.batch)
        found.append(order[done + decoded.ok])
        done += len(indices)
    asked = np.concatenate(found) if found else np.empty(0, np.int64)
    back = np.argsort(asked)
    return PairBatch.cat(batches)[torch.from_numpy(back)], positions[asked[back]]


def _prompted(sample: Sample, prompt: str) -> Sample:
    return sample if sample.caption is None else replace(sample, caption=prompt.replace("{}", sample.caption))
