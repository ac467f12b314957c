"""The price of passes in operations: a tangent costs twice what the value costs, whatever kernels compute it."""

from __future__ import annotations

import pytest
import torch

from pipeline.evaluation.flops import flop_counter
from pipeline.influence import Probe, ProbePlan, Scorer, Settings
from pipeline.models.clip import build_model, split_state
from pipeline.types import Checkpoint
from tests.evaluation.test_masked import make_pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_tangent_costs_three_forward_passes(dtype: torch.dtype) -> None:
    model = build_model("tiny-vit").to(dtype)
    params, buffers = split_state(model)
    pairs = make_pairs(16)
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in params.items()}
    plan = ProbePlan([Probe(1.0, along=("v",))], {"v": along})
    last = Checkpoint(2, 0.1, 0, params, buffers)
    first = Checkpoint(1, 0.1, 0, params, buffers)
    scorer = Scorer(model, [(first, plan), (last, ProbePlan([]))], pairs[:2], Settings())
    with torch.no_grad(), scorer.passes.ready(), flop_counter() as bare:
        model(pairs.images, pairs.tokens)
    with torch.no_grad(), flop_counter() as passes:
        scorer.score(pairs)
    # The second checkpoint gives loss and similarity: one more forward pass.
    assert passes.get_total_flops() / bare.get_total_flops() == pytest.approx(4, rel=0.15)


def test_attention_in_evaluation_is_counted() -> None:
    """By attention modules' shorter way, which the counter does not know, half of this would be missing."""
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), flop_counter() as counter:
        attention(x, x, x, need_weights=False)
    projections, products = 4 * 2 * 3 * 5 * 8 * 8, 2 * 2 * 3 * 5 * 5 * 8
    assert counter.get_total_flops() == projections + products
    assert torch.backends.mha.get_fastpath_enabled()
