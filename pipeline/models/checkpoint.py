"""Checkpoint files: ours (safetensors with the optimizer's state), open_clip's `epoch_N.pt`, plain safetensors.

A file of ours holds `params/NAME`, `buffers/NAME` and, where known, `exp_avg/NAME` and `exp_avg_sq/NAME` (AdamW) or
`momentum/NAME` (SGD), with step, rate and run as JSON in its metadata. Names are open_clip's.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.clip import split_state
from pipeline.store import storage
from pipeline.store.tensors import parse_tensors
from pipeline.types import AdamState, Checkpoint, Tree

#: The metadata key of our files. One key alone: safetensors writes several in an order that changes.
METADATA_KEY = "diffprune.checkpoint"

# What a learning rate computed by numpy needs beyond torch's own safe types (open_clip's schedulers use np.cos).
_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


def excluded_from_decay(name: str, parameter: Tensor) -> bool:
    """Whether open_clip's trainer (and ours) keeps weight decay off a parameter: gains, biases, the logit scale."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def decay_of_each(params: Tree, weight_decay: float) -> dict[str, float]:
    """The decoupled weight decay of each parameter: `theta *= 1 - rate * decay` before each step."""
    return {name: 0.0 if excluded_from_decay(name, value) else weight_decay for name, value in params.items()}


def save_checkpoint(url: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; equal checkpoints give equal bytes."""
    storage.write_bytes(url, serialise_checkpoint(checkpoint))


def serialise_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The bytes of a checkpoint file."""
    trees = {"params": checkpoint.params, "buffers": checkpoint.buffers}
    header: dict[str, Any] = {"step": checkpoint.step, "lr": checkpoint.lr, "run": checkpoint.run}
    if (adam := checkpoint.adam) is not None:
        trees |= {"exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}
        header["adam"] = {"steps": adam.steps, "beta1": adam.beta1, "beta2": adam.beta2, "eps": adam.eps}
    if checkpoint.momentum is not None:
        trees["momentum"] = checkpoint.momentum
        header["momentum"] = True
    if checkpoint.momentum is not None or checkpoint.gain != 1:
        header["gain"] = checkpoint.gain
    tensors = {
        f"{kind}/{name}": value.detach().cpu().contiguous()
        for kind, tree in trees.items()
        for name, value in tree.items()
    }
    return safetensors.torch.save(tensors, metadata={METADATA_KEY: json.dumps(header)})


def load_checkpoint(
    url: str,
    model: nn.Module | None = None,
    *,
    step: int | None = None,
    lr: float | None = None,
    run: int | None = None,
) -> Checkpoint:
    """Read a checkpoint of any of the three forms, on the CPU.

    Args:
        url: the file.
        model: what it must fit: names and shapes are checked. Needed for files that are not ours, which do not say
            what is a parameter.
        step: optimizer steps so far; overrides what the file says, and is needed where it says nothing.
        lr: rate of the last step; the same.
        run: the proxy run it belongs to; None takes the file's, else 0.

    Raises `InputError` for a file that is absent, broken, or of another model, `ValueError` for one that is not ours
    without a `model`.
    """
    try:
        if url.endswith(".safetensors"):
            tensors, header = _read_safetensors(url)
            checkpoint = _ours(tensors, header) if header is not None else _plain(url, tensors, model, step, lr)
        else:
            checkpoint = _open_clip(url, model, step, lr)
    except (LookupError, TypeError, AttributeError) as error:  # a value is missing, or another one than it should be
        raise InputError(
            f"{url}: expected a checkpoint of ours or of open_clip's trainer: {type(error).__name__}: {error}"
        ) from None
    if model is not None:
        _check_fit(url, checkpoint, model)
    checkpoint.step = checkpoint.step if step is None else step
    checkpoint.lr = checkpoint.lr if lr is None else lr
    checkpoint.run = checkpoint.run if run is None else run
    return checkpoint


def _read_safetensors(url: str) -> tuple[Tree, dict[str, Any] | None]:
    """All tensors, and our metadata where the file is ours."""
    try:
        tensors, metadata = parse_tensors(storage.read_bytes(url))
    except OSError as error:
        raise InputError(f"{url}: expected a checkpoint: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{url}: expected a whole safetensors file: {error}") from None
    return tensors, json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None


def _ours(tensors: Tree, header: dict[str, Any]) -> Checkpoint:
    trees: dict[str, Tree] = {kind: {} for kind in ("params", "buffers", "exp_avg", "exp_avg_sq", "momentum")}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        trees[kind][name] = value
    adam = header.get("adam")
    return Checkpoint(
        step=header["step"],
        lr=header["lr"],
        run=header["run"],
        params=trees["params"],
        buffers=trees["buffers"],
        adam=AdamState(exp_avg=trees["exp_avg"], exp_avg_sq=trees["exp_avg_sq"], **adam) if adam else None,
        momentum=trees["momentum"] if header.get("momentum") else None,
        gain=header.get("gain", None if header.get("momentum") else 1.0),
    )


def _plain(url: str, tensors: Tree, model: nn.Module | None, step: int | None, lr: float | None) -> Checkpoint:
    if step is None or lr is None:
        raise InputError(
            f"{url}: expected a step and a learning rate for a plain safetensors file "
            "(proxy.checkpoint_steps and proxy.checkpoint_rates, or step and lr in the manifest)"
        )
    params, buffers = _split(url, tensors, model)
    return Checkpoint(step=step, lr=lr, run=0, params=params, buffers=buffers)


def _open_clip(url: str, model: nn.Module | None, step: int | None, lr: float | None) -> Checkpoint:
    """open_clip's trainer file: `state_dict`, `optimizer`."""
    tree = _read_torch(url)
    state = tree.get("state_dict")
    if not isinstance(state, dict):
        raise InputError(f"{url}: expected open_clip's 'state_dict', found the keys {_some(map(str, tree))}")
    params, buffers = _split(url, {own_name(name): value for name, value in state.items()}, model)
    optimizer = tree.get("optimizer")
    groups = optimizer["param_groups"] if optimizer else []
    adam = _adam_state(url, params, optimizer) if optimizer else None
    if groups and lr is None:
        lr = float(groups[0]["lr"])
    if adam is not None and step is None:
        step = adam.steps
    if step is None or lr is None:
        raise InputError(
            f"{url}: expected the optimizer's state with step and learning rate, found none; "
            "give proxy.checkpoint_steps and proxy.checkpoint_rates"
        )
    gain = gain_of(groups[0]) if groups else 1.0
    return Checkpoint(step=step, lr=lr, run=0, params=params, buffers=buffers, adam=adam, gain=gain)


def own_name(name: str) -> str:
    """A tensor's name without what DistributedDataParallel and `torch.compile` put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def gain_of(group: dict[str, Any]) -> float:
    """`Checkpoint.gain` of a group of an optimizer: SGD's alone has a dampening, and Nesterov's form settles alike."""
    momentum = group["momentum"] if "dampening" in group else 0.0
    return (1 - group["dampening"]) / (1 - momentum) if momentum else 1.0


def _read_torch(url: str) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            tree = torch.load(io.BytesIO(storage.read_bytes(url)), map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{url}: expected a checkpoint: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # its text advises to load without `weights_only`, which runs what is in the file
        raise InputError(f"{url}: expected a checkpoint of tensors and plain values, found something else") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{url}: expected a whole checkpoint of tensors and plain values: {reason}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{url}: expected a dictionary with 'state_dict', found {type(tree).__name__}")
    return tree


def _split(url: str, tensors: Tree, model: nn.Module | None) -> tuple[Tree, Tree]:
    """Parameters (float32) and buffers of a state dict, which must have what the model has and nothing else."""
    if model is None:
        raise ValueError("a checkpoint of another program needs the model that it is of")
    params, buffers = split_state(model)
    absent = sorted((params.keys() | buffers.keys()) - tensors.keys())
    unknown = sorted(tensors.keys() - params.keys() - buffers.keys())
    for what, names in (("lacks", absent), ("has the unknown", unknown)):
        if names:
            raise InputError(f"{url}: expected a checkpoint of this model, it {what} {_some(names)}")
    floats = {name: tensors[name].to(params[name].dtype) for name in params}
    return floats, {name: tensors[name] for name in buffers}


def _adam_state(url: str, params: Tree, optimizer: dict[str, Any]) -> AdamState | None:
    """Adam's state by name; None where the optimizer keeps none (SGD, Lion, or before the first step).

    open_clip's optimizer numbers its state in the order of its two groups: first what has no weight decay, then the
    rest, each in the order of `named_parameters()`.
    """
    state = optimizer.get("state", {})
    if not state or any("exp_avg_sq" not in entry for entry in state.values()):
        return None
    names = [name for name, p in params.items() if excluded_from_decay(name, p)]
    sizes = [len(names), len(params) - len(names)]
    names += [name for name, p in params.items() if not excluded_from_decay(name, p)]
    groups = optimizer["param_groups"]
    found = [len(group["params"]) for group in groups]
    if found != sizes:
        raise InputError(
            f"{url}: expected the optimizer's two groups (without and with weight decay) to hold {sizes} parameters, "
            f"found {found}: checkpoints with a locked tower or another grouping can be used without 'optimizer'"
        )
    numbers = [number for group in groups for number in group["params"]]
    moments: dict[str, Tree] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, number in zip(names, numbers, strict=True):
        for kind, tree in moments.items():
            value = state[number][kind] if number in state else torch.zeros_like(params[name])
            if value.shape != params[name].shape:
                raise InputError(
                    f"{url}: expected {kind} of {name} to have the shape {list(params[name].shape)}, "
                    f"found {list(value.shape)}"
                )
            tree[name] = value.float()
    return adam_of(state.values(), groups[0], moments["exp_avg"], moments["exp_avg_sq"])


def adam_of(states: Iterable[dict[str, Any]], group: dict[str, Any], exp_avg: Tree, exp_avg_sq: Tree) -> AdamState:
    """Adam's state from an optimizer's own: its states (empty before the first step), a group, and moments by name."""
    steps = max(int(state["step"]) for state in states if state)
    beta1, beta2 = group["betas"]
    return AdamState(steps, exp_avg, exp_avg_sq, float(beta1), float(beta2), float(group["eps"]))


def _check_fit(url: str, checkpoint: Checkpoint, model: nn.Module) -> None:
    for found, expected in zip((checkpoint.params, checkpoint.buffers), split_state(model), strict=True):
        if found.keys() != expected.keys():
            raise InputError(
                f"{url}: expected a checkpoint of this model, they differ in {_some(found.keys() ^ expected.keys())}"
            )
        for name, value in expected.items():
            if found[name].shape != value.shape:
                raise InputError(
                    f"{url}: expected {name} to have the shape {list(value.shape)}, found {list(found[name].shape)}"
                )


def _some(names: Any, limit: int = 3) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
