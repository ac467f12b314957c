"""Gradients and Hessian products of a batch's loss are those of the whole batch, in however many parts it is run."""

from __future__ import annotations

import gc

import pytest
import torch

from pipeline.influence import Settings
from pipeline.influence.gradients import BatchLoss
from pipeline.influence.passes import Passes
from pipeline.influence.trees import to_device
from tests.influence.oracle import Explicit
from tests.influence.test_diff_in import assert_close, make_case
from tests.influence.test_scorer import LACKS, Cramped
from tests.influence.towers import SmallTowers, make_pairs, state_of
from tests.pretended import machine


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


def cramped_loss(room, error=None):
    towers, (checkpoint, *_), batches, _ = make_case(Settings())
    model = Cramped(towers, 100, error)
    state = {f"towers.{name}": value for name, value in checkpoint.params.items()}
    passes = Passes(model, Settings())
    loss, whole = (BatchLoss(passes, batches.gradient, list(state)) for _ in range(2))
    expected = whole.value(state), whole.gradient(state), whole.hessian_product(state, state)
    model.room, model.tried = room, []
    return model, passes, loss, state, expected


@pytest.mark.parametrize("error", [None, *LACKS], ids=lambda error: str(error)[:40])
@pytest.mark.parametrize("first", ["value", "gradient", "hessian_product"])
def test_parts_that_memory_does_not_hold_are_halved_for_good(first, error):
    model, passes, loss, state, (value, gradient, product) = cramped_loss(3, error)
    work = {
        "value": lambda: assert_close(loss.value(state), value, 1e-12),
        "gradient": lambda: assert_tree_close(loss.gradient(state), gradient),
        "hessian_product": lambda: assert_tree_close(loss.hessian_product(state, state), product),
    }
    gc.disable()
    try:
        work[first]()
    finally:
        gc.enable()
    assert model.lost
    assert not model.still_held, "what a part held that did not fit is still there for the next one"
    assert passes.chunk == 3
    tried = len(model.tried)
    for each in work.values():
        each()
    assert max(model.tried[tried:]) == 3


def assert_tree_close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_a_device_that_does_not_hold_one_pair_is_an_error():
    _, _, loss, state, _ = cramped_loss(0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        loss.gradient(state)


def test_on_a_gpu_parts_are_of_64_pairs_at_most():
    model, pairs, settings = SmallTowers(), make_pairs(150, seed=4), Settings(chunk=1024)
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with machine() as device:
        model.to(device)
        state = to_device(state_of(model), device)
        loss = BatchLoss(Passes(model, settings), pairs.to(device), list(state))
        loss.hessian_product(state, loss.gradient(state))
        assert sizes == [64, 64, 22] * 4
        fewer = BatchLoss(Passes(model, Settings(chunk=50)), pairs.to(device), list(state))
        fewer.value(state)
    assert sizes[12:] == [50] * 3
