"""Second forward derivatives through norms, most of all by their input's own statistics."""

from __future__ import annotations

import pytest
import torch

# Before timm, which imports torchvision:
from pipeline.models import compat  # noqa: F401  isort: skip
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.func import jvp, vmap
from torch.nn import functional

from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.influence.twice import TwiceDifferentiable
from tests.influence.oracle import Explicit
from tests.influence.test_diff_in import assert_close
from tests.influence.test_tangents import assert_same, tensors
from tests.influence.towers import SmallTowers, make_pairs, trained


def literal(x, dims, w, b, eps=1e-5):
    """The norm over these dimensions from its definition, with weight and bias per channel."""
    normal = (x - x.mean(dims, keepdim=True)) / (x.var(dims, unbiased=False, keepdim=True) + eps).sqrt()
    return normal * w[:, None] + b[:, None]


def each_row(w, b):
    """Weight and bias of a layer norm over `[4, 5]` that are those of its channels."""
    return (4, 5), w[:, None].expand(4, 5), b[:, None].expand(4, 5)


KEPT = {"mean": torch.linspace(-1, 1, 4).double(), "variance": torch.linspace(0.5, 2, 4).double()}
NORMS = {
    "layer": (lambda x, w, b: functional.layer_norm(x, *each_row(w, b)), (1, 2)),
    "batch": (lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True), (0, 2)),
    "instance": (lambda x, w, b: functional.instance_norm(x, weight=w, bias=b), (2,)),
    "batch, kept": (lambda x, w, b: functional.batch_norm(x, *KEPT.values(), w, b), None),
    "instance, kept": (lambda x, w, b: functional.instance_norm(x, *KEPT.values(), w, b, use_input_stats=False), None),
}


@pytest.mark.parametrize(("norm", "dims"), NORMS.values(), ids=NORMS)
def test_second_derivatives_of_norms(norm, dims):
    at, inner, outer = (tensors((3, 4, 5), (4,), (4,), seed=seed) for seed in range(3))

    def expected_of(x, w, b):
        if dims is not None:
            return literal(x, dims, w, b)
        normal = (x - KEPT["mean"][:, None]) / (KEPT["variance"][:, None] + 1e-5).sqrt()
        return normal * w[:, None] + b[:, None]

    def twice(function, tangents):
        return jvp(lambda *points: jvp(function, points, inner)[1], at, tangents)[1]

    expected = twice(expected_of, outer)
    with TwiceDifferentiable():
        found = twice(norm, outer)
        stacked = vmap(lambda *tangents: twice(norm, tangents))(*(torch.stack([t, 2 * t]) for t in outer))
    assert_same(found, expected, 1e-9)
    assert_same(stacked, torch.stack([expected, 2 * expected]), 1e-9)


class Standardised(SmallTowers):
    """Its images, `[n, 3, 4, 4]`, go through convolutions of standardised weights."""

    def __init__(self, conv):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            layers = [conv(3, 3, 3, padding=0), nn.GELU(), conv(3, 2, 2, padding=0), nn.Flatten(), nn.Linear(2, 3)]
            self.visual = nn.Sequential(nn.Unflatten(1, (3, 4, 4)), *layers).double()


def literal_batch_norm(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """By its own statistics, of tensors `[n, c, k]`."""
    assert training
    one, zero = torch.ones_like(x[0, :, 0]), torch.zeros_like(x[0, :, 0])
    return literal(x, (0, 2), one if weight is None else weight, zero if bias is None else bias, eps)


@pytest.mark.parametrize("conv", [StdConv2d, ScaledStdConv2d])
def test_exact_equals_equation_9_with_standardised_convolutions(conv, monkeypatch):
    settings, model = Settings(method="exact"), Standardised(conv)
    pool = make_pairs(16, seed=1, size=4)
    (checkpoint,) = trained(model, pool, settings, steps=(3,))
    batches = Batches(pool[:4], pool[5:11], make_pairs(5, seed=2, first_id=500, size=4))
    plan = prepare(model, checkpoint, batches, settings, dataset_size=16, num_checkpoints=1)
    found = Scorer(model, [(checkpoint, plan)], batches.reference, settings).score(pool[12:]).terms[:, 0]
    # torch's own batch norm has a wrong Hessian under vmap, which the explicit one is taken by.
    monkeypatch.setattr(functional, "batch_norm", literal_batch_norm)
    assert_close(found, Explicit(model, checkpoint, settings).diff_in(pool[12:], batches, 16, 1), 1e-9)
