"""The state of a training loop as a checkpoint: weights, learning rate, and what the optimizer keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.checkpoint import adam_of, gain_of, own_name
from pipeline.models.clip import split_state
from pipeline.types import Checkpoint, Tree


def checkpoint_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    lr: float | None = None,
    run: int = 0,
) -> Checkpoint:
    """A copy of a model in training on the CPU, with the optimizer's state: a checkpoint to score along.

    Args:
        model: of `build_model` or open_clip, also compiled or within DistributedDataParallel.
        optimizer: AdamW or SGD over all parameters that are trained. With None pairs are scored as SGD would use them.
        step: steps taken so far.
        lr: rate of the last of them; None takes the optimizer's, so call this before a scheduler moves it on.
        run: the training run it belongs to.

    Raises `InputError` for an optimizer of other parameters, with several rates or with another kind of state, and
    where neither says the rate.

    >>> import torch
    >>> from pipeline import build_model
    >>> model = build_model("digits-vit")
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    >>> sum(value.sum() for value in model.parameters()).backward()
    >>> optimizer.step()
    >>> made = checkpoint_of(model, optimizer, step=1)
    >>> made.lr, made.adam.steps, made.adam.exp_avg.keys() == made.params.keys()
    (0.001, 1, True)
    """
    params, buffers = split_state(model)
    if lr is None:
        lr = _rate(optimizer)
    floats = {own_name(name): _copied(value) for name, value in params.items()}
    kept = {own_name(name): value.to("cpu", copy=True) for name, value in buffers.items()}
    made = Checkpoint(step, lr, run, floats, kept)
    if optimizer is not None:
        _add_state(made, optimizer, {own_name(name): p for name, p in model.named_parameters() if p.requires_grad})
    return made


def _rate(optimizer: torch.optim.Optimizer | None) -> float:
    rates = {float(group["lr"]) for group in optimizer.param_groups} if optimizer else set()
    if len(rates) != 1:
        raise InputError(f"expected one learning rate of all parameters, or `lr`, found {sorted(rates) or 'none'}")
    return rates.pop()


def _add_state(made: Checkpoint, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Adam's moments or SGD's momentum, by name."""
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in optimised:
            raise InputError(f"expected an optimizer of all parameters that are trained, it lacks {name}")
    states = {name: optimizer.state.get(p, {}) for name, p in parameters.items()}
    kinds = {kind for state in states.values() for kind, value in state.items() if value is not None}
    group = optimizer.param_groups[0]
    if {"exp_avg", "exp_avg_sq"} <= kinds:
        first, second = (_moments(states, kind, made.params) for kind in ("exp_avg", "exp_avg_sq"))
        made.adam = adam_of(states.values(), group, first, second)
    elif "momentum_buffer" in kinds:
        made.momentum = _moments(states, "momentum_buffer", made.params)
        made.gain = gain_of(group)
    elif kinds:
        raise InputError(
            f"expected AdamW or SGD, found {type(optimizer).__name__} with {', '.join(sorted(kinds))}; "
            "leave the optimizer out and give `lr` to use the weights alone"
        )


def _moments(states: dict[str, dict[str, Tensor]], kind: str, params: Tree) -> Tree:
    """One kind of state of each parameter; zeros for one that no gradient has reached."""
    return {
        name: _copied(state[kind]) if state.get(kind) is not None else torch.zeros_like(params[name])
        for name, state in states.items()
    }


def _copied(value: Tensor) -> Tensor:
    """A copy on the CPU, of float32 at least."""
    return value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32), copy=True)
