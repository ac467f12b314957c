"""Dense products are torch's own to rounding, whatever computes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pipeline.influence.dense import linear, linear_added


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (0, 5), (3, 2, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_torch(dtype, shape, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    if shape[0] == 3:
        x = x.transpose(0, 1)  # rows that do not lie one after the other
    weight, offset = (torch.randn(s, generator=generator, dtype=dtype) for s in ((4, 5), (4,)))
    expected = functional.linear(x, weight, offset if bias else None)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, offset if bias else None), expected)
        total = torch.randn(expected.shape, generator=generator, dtype=dtype)
        torch.testing.assert_close(linear_added(total.clone(), x, weight), total + functional.linear(x, weight))


def test_gradients_flow_where_they_are_asked_for():
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 3), 2.0))
