"""Gradients and Hessian products of a batch's loss are those of the whole batch, in however many parts it is run."""

from __future__ import annotations

import pytest
import torch

from pipeline.influence import Settings
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.passes import Passes
from tests.influence.oracle import Explicit
from tests.influence.test_diff_in import assert_close, make_case


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_parts_make_up_the_whole(chunk):
    settings = Settings(chunk=chunk)
    model, (checkpoint, *_), batches, _ = make_case(settings)
    explicit = Explicit(model, checkpoint, settings)
    loss = BatchLoss(Passes(model, settings), batches.gradient, list(checkpoint.params))
    vector = explicit.tree(torch.linspace(-1, 1, len(explicit.theta), dtype=torch.float64))

    def flat(tree):
        return torch.cat([tree[name].reshape(-1) for name in checkpoint.params])

    assert_close(loss.value(checkpoint.params), explicit.batch(batches.gradient, 0), 1e-12)
    assert_close(flat(loss.gradient(checkpoint.params)), explicit.batch(batches.gradient, 1), 1e-10)
    product = explicit.batch(batches.gradient, 2) @ flat(vector)
    assert_close(flat(loss.hessian_product(checkpoint.params, vector)), product, 1e-9)
