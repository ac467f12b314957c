"""Checkpoints of a training loop of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import InputError, build_model, checkpoint_of, load_checkpoint, save_checkpoint
from pipeline.models.clip import PairModel


@pytest.fixture(scope="module")
def model() -> PairModel:
    """A small proxy with gradients; the optimizers of the tests are steps away from it, which none undoes."""
    model = build_model("digits-vit")
    torch.stack([p.square().sum() for p in model.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
    return model


def test_adamw_state_goes_to_a_file_and_back(model: PairModel, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), eps=1e-7)
    optimizer.step()
    optimizer.step()
    made = checkpoint_of(model, optimizer, step=7, run=2)
    assert made.adam is not None
    assert (made.step, made.lr, made.run, made.gain) == (7, 2e-3, 2, 1)
    assert (made.adam.steps, made.adam.beta1, made.adam.beta2, made.adam.eps) == (2, 0.9, 0.95, 1e-7)
    before = made.params["logit_scale"].clone()
    optimizer.step()
    assert torch.equal(made.params["logit_scale"], before), "a copy"
    assert not torch.equal(model.logit_scale, before)
    save_checkpoint(str(tmp_path / "made.safetensors"), made)
    read = load_checkpoint(str(tmp_path / "made.safetensors"), model)
    assert read.adam is not None
    assert (read.step, read.lr, read.run) == (7, 2e-3, 2)
    for name, value in made.adam.exp_avg_sq.items():
        assert torch.equal(read.adam.exp_avg_sq[name], value)
        assert torch.equal(read.params[name], made.params[name])


@pytest.mark.parametrize(("dampening", "gain"), [(0.0, 10.0), (0.5, 5.0)])
def test_momentum_and_the_length_of_its_steps(model: PairModel, dampening: float, gain: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, dampening=dampening)
    optimizer.step()
    made = checkpoint_of(model, optimizer, step=1)
    assert made.momentum is not None
    assert made.adam is None
    assert made.gain == pytest.approx(gain)
    for name, parameter in model.named_parameters():
        assert torch.equal(made.momentum[name], optimizer.state[parameter]["momentum_buffer"])


def test_plain_sgd_and_weights_alone_have_no_state(model: PairModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    optimizer.step()
    for made in (checkpoint_of(model, optimizer, step=1), checkpoint_of(model, step=1, lr=1e-4)):
        assert (made.lr, made.adam, made.momentum, made.gain) == (1e-4, None, None, 1)


def test_names_and_precision_are_those_that_a_model_is_read_with(model: PairModel) -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = build_model("digits-vit").bfloat16()

    made = checkpoint_of(DistributedDataParallel(), step=1, lr=1e-3)
    assert made.params.keys() == dict(model.named_parameters()).keys()
    assert {value.dtype for value in made.params.values()} == {torch.float32}


def test_a_parameter_that_no_gradient_has_reached_has_an_empty_state() -> None:
    model = build_model("digits-vit")
    model.logit_scale.square().backward()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    made = checkpoint_of(model, optimizer, step=1)
    assert made.adam is not None
    assert made.adam.exp_avg.keys() == made.params.keys()
    assert made.adam.exp_avg["logit_scale"] != 0
    assert not made.adam.exp_avg["text_projection"].any()


def test_what_cannot_be_scored_along_is_refused(model: PairModel) -> None:
    first, *others = model.parameters()
    with pytest.raises(InputError, match="it lacks positional_embedding"):
        checkpoint_of(model, torch.optim.AdamW(others), step=1)
    with pytest.raises(InputError, match=r"one learning rate .* found \[0.001, 0.1\]"):
        checkpoint_of(model, torch.optim.AdamW([{"params": first, "lr": 0.1}, {"params": others}]), step=1)
    with pytest.raises(InputError, match="found none"):
        checkpoint_of(model, step=1)
    other = torch.optim.RMSprop(model.parameters())
    other.step()
    with pytest.raises(InputError, match="expected AdamW or SGD, found RMSprop with square_avg, step"):
        checkpoint_of(model, other, step=1)
