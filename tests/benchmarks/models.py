"""Models and briefly trained proxies on scanned digits: what the benchmarks of the influence engine are run on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import interpolate

from pipeline.influence import Batches
from pipeline.influence.losses import batch_loss, similar_captions
from pipeline.models.clip import PairModel, build_model, split_state
from pipeline.types import AdamState, Checkpoint, PairBatch, Tree

#: 27M parameters at 112 px: 50 image tokens, 32 text tokens.
MEDIUM: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "layers": 6, "width": 384, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORMS = ("a handwritten {}", "the digit {}", "a scan of the number {}", "{} written by hand", "somebody wrote {}")


def digit_pairs(model: PairModel, count: int, seed: int = 0) -> PairBatch:
    """Scanned digits in the model's size, with varied captions of which a fifth is drawn at random."""
    from sklearn.datasets import load_digits

    rows, _, labels, forms, generator = _drawn(count, seed)
    grey = torch.tensor(load_digits().images)[rows][:, None] / 16 * 255
    images = interpolate(grey.float(), model.image_spec.size, mode="bilinear").round().to(torch.uint8)
    captions = [_FORMS[form].format(_NAMES[label]) for form, label in zip(forms.tolist(), labels.tolist(), strict=True)]
    ids = torch.randint(0, 2**62, (count,), generator=generator)
    tokens = model.tokenize(captions)
    return PairBatch(images.expand(-1, 3, -1, -1).contiguous(), tokens, ids, forms * 10 + labels)


def wrong_captions(count: int, seed: int = 0) -> np.ndarray:
    """Which of the `digit_pairs` of that count and seed have a caption that names another digit, bool `[count]`."""
    _, shown, named, _, _ = _drawn(count, seed)
    return (shown != named).numpy()


def _drawn(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(digits.target), (count,), generator=generator)
    shown = torch.tensor(digits.target)[rows]
    random = torch.rand(count, generator=generator) < 0.2
    named = torch.where(random, torch.randint(0, 10, (count,), generator=generator), shown)
    forms = torch.randint(0, len(_FORMS), (count,), generator=generator)
    return rows, shown, named, forms, generator


def trained_checkpoint(
    model: PairModel, pairs: PairBatch, steps: int, batch: int = 128, lr: float = 1e-3, ignore: bool = False
) -> Checkpoint:
    """The model after some AdamW steps, with Adam's state."""
    params, buffers = split_state(model)
    state: Tree = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.AdamW(list(state.values()), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        part = pairs[torch.randperm(len(pairs), generator=generator)[:batch]]
        optimizer.zero_grad()
        _loss(model, {**state, **buffers}, part, ignore).backward()
        optimizer.step()
    first = {name: optimizer.state[value]["exp_avg"] for name, value in state.items()}
    second = {name: optimizer.state[value]["exp_avg_sq"] for name, value in state.items()}
    adam = AdamState(steps, first, second, 0.9, 0.98, 1e-6)
    return Checkpoint(steps, lr, 0, {name: value.detach() for name, value in state.items()}, buffers, adam)


def cast(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint with floating-point tensors of another dtype."""

    def tree(values: Tree) -> Tree:
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}

    adam = checkpoint.adam
    if adam is not None:
        adam = AdamState(adam.steps, tree(adam.exp_avg), tree(adam.exp_avg_sq), adam.beta1, adam.beta2, adam.eps)
    return Checkpoint(
        checkpoint.step, checkpoint.lr, checkpoint.run, tree(checkpoint.params), tree(checkpoint.buffers), adam
    )


def two_checkpoints(name: str = "tiny-vit") -> tuple[PairModel, list[Checkpoint], Batches, PairBatch]:
    """A model, two of its checkpoints after a few steps, batches, and pairs to score."""
    model = small_model(name)
    pool = digit_pairs(model, 448)
    checkpoints = [trained_checkpoint(model, pool[:256], steps) for steps in (10, 20)]
    return model, checkpoints, Batches(pool[:32], pool[64:128], pool[256:320]), pool[384:]


def small_model(name: str = "tiny-vit", dtype: torch.dtype = torch.float32) -> PairModel:
    """One of the shipped configs, in a dtype."""
    return build_model(name).to(dtype)


def medium_model(dtype: torch.dtype = torch.float32, context_length: int = 32) -> PairModel:
    """`MEDIUM` at its initial weights."""
    config = {**MEDIUM, "text_cfg": {**MEDIUM["text_cfg"], "context_length": context_length}}
    return model_of(config).to(dtype)


def model_of(config: dict[str, Any]) -> PairModel:
    """The model of an open_clip config, at its initial weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.json").write_text(json.dumps(config))
        return build_model(str(Path(folder, "model.json")))


def _loss(model: PairModel, state: Tree, part: PairBatch, ignore: bool) -> Tensor:
    features = functional_call(model, state, (part.images, part.tokens))
    return batch_loss(features, similar_captions(part.captions, part.captions, ignore), "clip")
