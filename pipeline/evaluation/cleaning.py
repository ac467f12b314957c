"""Cleaning judged by retraining: the same run without the pairs that an estimator suspects."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.arrays import Bool, Float64
from pipeline.evaluation.small_run import SmallRun
from pipeline.types import PairBatch


def with_swapped_captions(data: PairBatch, share: float, seed: int) -> tuple[PairBatch, Bool]:
    """The pairs, with the captions of a random share of them exchanged; and which got another caption, bool `[n]`."""
    rng = np.random.default_rng(seed)
    chosen = torch.from_numpy(rng.permutation(len(data))[: round(share * len(data))])
    source = torch.arange(len(data))
    source[chosen] = chosen.roll(1)
    swapped = PairBatch(data.images, data.tokens[source], data.ids, data.captions[source])
    return swapped, np.asarray((swapped.captions != data.captions).numpy(), bool)


def suspects(utilities: Float64, count: int) -> Bool:
    """The `count` pairs of lowest utility, bool `[n]`."""
    found = np.zeros(len(utilities), dtype=bool)
    found[np.argsort(utilities, kind="stable")[:count]] = True
    return found


def losses_without(run: SmallRun, sets: list[Bool]) -> Float64:
    """The target loss after training without each set, `[len(sets)]`."""
    return np.asarray(run.losses(torch.from_numpy(np.stack(sets))).numpy(), np.float64)
