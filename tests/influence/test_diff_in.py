"""Diff-In equals Eq. 9 written out, in all its forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.types import PairBatch
from tests.influence.oracle import Explicit
from tests.influence.towers import SmallTowers, cast, make_pairs, trained

N = 40


def make_case(settings: Settings, dtype: torch.dtype = torch.float64, captions: int | None = None):
    model = SmallTowers(bias=settings.family == "siglip")
    pool = make_pairs(N, seed=1, captions=captions)
    checkpoints = [cast(c, dtype) for c in trained(model, pool, settings, steps=(3, 8, 15))]
    model.to(dtype)
    batches = Batches(
        reference=pool[:7], gradient=pool[5:17], target=make_pairs(9, seed=2, first_id=500, captions=captions)
    )
    # Two pairs that are in R, the rest are not.
    pairs = PairBatch.cat([pool[2:4], pool[20:24]])
    return model, checkpoints, batches, pairs


def score(model, checkpoints, batches, pairs, settings, **kwargs):
    plans = [
        prepare(model, c, batches, settings, dataset_size=N, num_checkpoints=len(checkpoints)) for c in checkpoints
    ]
    return Scorer(model, list(zip(checkpoints, plans, strict=True)), batches.reference, settings, **kwargs).score(pairs)


def assert_close(found, expected, relative):
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < relative, f"relative error {error:.2e}"


FORMS = [
    Settings(loss=loss, precondition=precondition, family=family)
    for loss in ("marginal", "row")
    for precondition in ("none", "adam")
    for family in ("clip", "siglip")
] + [
    Settings(target_loss="margin", family=family, equal_captions=equal)
    for family, equal in (("clip", "ignore"), ("siglip", "negative"))
]


@pytest.mark.parametrize("settings", FORMS, ids=lambda s: f"{s.loss}-{s.precondition}-{s.family}-{s.target_loss}")
def test_equals_equation_9_in_float64(settings):
    model, checkpoints, batches, pairs = make_case(
        settings, captions=5 if settings.equal_captions == "ignore" else None
    )
    expected = torch.stack([Explicit(model, c, settings).diff_in(pairs, batches, N, 3) for c in checkpoints], 1)
    for method, relative in (("exact", 1e-9), ("central", 1e-6), ("forward", 1e-3)):
        found = score(model, checkpoints, batches, pairs, replace(settings, method=method)).terms
        for index in range(len(checkpoints)):
            assert_close(found[:, index], expected[:, index], relative)


@pytest.mark.parametrize("loss", ["marginal", "row"])
def test_equals_equation_9_with_equal_captions_ignored(loss):
    settings = Settings(loss=loss, equal_captions="ignore", method="exact")
    model, checkpoints, batches, pairs = make_case(settings, captions=4)
    expected = torch.stack([Explicit(model, c, settings).diff_in(pairs, batches, N, 3) for c in checkpoints], 1)
    assert_close(score(model, checkpoints, batches, pairs, settings).terms, expected, 1e-9)
