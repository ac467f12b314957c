from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from pipeline.evaluation.masked import (
    Recipe,
    checkpoint_of,
    compact_vocabulary,
    masked_loss,
    target_losses,
    train_masked,
)
from pipeline.influence import StepRule
from pipeline.models.checkpoint import decay_of_each
from pipeline.models.clip import build_model, split_state
from pipeline.types import Checkpoint, Features, PairBatch

RULE = StepRule("sgd", {})


def make_pairs(n: int, seed: int = 0) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(n, 16, dtype=torch.long)
    tokens[:, 0] = 49406
    tokens[:, 1:4] = torch.randint(1, 400, (n, 3), generator=generator)
    tokens[:, 4] = 49407
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return PairBatch(images, tokens, torch.arange(n), torch.arange(n) % 5)


@pytest.fixture(scope="module")
def setting() -> tuple[torch.nn.Module, Checkpoint, PairBatch, PairBatch]:
    model = build_model("tiny-vit", seed=3)
    model, (data, target) = compact_vocabulary(model, [make_pairs(24), make_pairs(10, seed=1)])
    model = model.double()
    params, buffers = split_state(model)
    return model, Checkpoint(0, 0.0, 0, params, buffers), data, target


def test_a_smaller_vocabulary_changes_no_feature() -> None:
    data = make_pairs(6)
    before = build_model("tiny-vit", seed=3)(data.images, data.tokens)
    small, (renumbered,) = compact_vocabulary(build_model("tiny-vit", seed=3), [data])
    after = small(renumbered.images, renumbered.tokens)
    assert small.get_submodule("token_embedding").weight.shape[0] < 30
    assert torch.equal(before.text, after.text)


@pytest.mark.parametrize(
    ("custom", "text"),
    [
        (False, {"pool_type": "argmax"}),
        (False, {"pool_type": "eos", "eos_id": 49407}),
        (False, {"pool_type": "eos", "eos_id": 5}),
        (True, {"pool_type": "argmax"}),
        (True, {"pool_type": "eos", "eos_id": 49407}),
        (True, {"pool_type": "eos", "eos_id": 5}),
        (True, {"embed_cls": True, "pool_type": "last"}),
        (True, {"embed_cls": True, "pool_type": "last", "pad_id": 5}),
    ],
    ids=str,
)
def test_towers_that_look_for_a_token_find_its_new_number(custom: bool, text: dict[str, Any], tmp_path: Path) -> None:
    towers = {
        "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, **text},
    }
    config = tmp_path / "model.json"
    config.write_text(json.dumps({"embed_dim": 8, "custom_text": custom, **towers}))
    data = make_pairs(6)
    data.tokens[:, 4] = text.get("eos_id", 49407)  # where the text ends
    data.tokens[::2, 5:] = text.get("pad_id", 0)
    data.tokens[1::2, 5:] = torch.randint(400, 500, (3, 11), generator=torch.Generator().manual_seed(1))
    before = build_model(str(config), seed=3)(data.images, data.tokens)
    small, (renumbered,) = compact_vocabulary(build_model(str(config), seed=3), [data])
    after = small(renumbered.images, renumbered.tokens)
    assert int(renumbered.tokens.max()) < 70
    assert before.text.std(0).max() > 0.01
    torch.testing.assert_close(after.text, before.text, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ignore_equal", [False, True])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_masked_pair_is_as_if_absent(
    setting: tuple[torch.nn.Module, Checkpoint, PairBatch, PairBatch], family: str, ignore_equal: bool
) -> None:
    model, _, data, _ = setting
    recipe = Recipe(data.ids[None], [0.1], RULE, family=family, ignore_equal_captions=ignore_equal)
    features = model(data.images, data.tokens)
    keep = torch.ones(24, dtype=torch.float64)
    keep[[2, 7, 8]] = 0
    rest = data[keep.bool()]
    alone = model(rest.images, rest.tokens)
    expected = masked_loss(alone, torch.ones(21, dtype=torch.float64), rest.captions, recipe)
    assert masked_loss(features, keep, data.captions, recipe).item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_captions_are_no_negatives_when_ignored() -> None:
    image = torch.eye(3, dtype=torch.float64)
    text = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]], dtype=torch.float64)
    keep, captions = torch.ones(3, dtype=torch.float64), torch.tensor([5, 5, 6])
    recipe = Recipe(torch.arange(3)[None], [0.1], RULE, ignore_equal_captions=True)
    loss = masked_loss(Features(image, text, torch.tensor(2.0), torch.tensor(0.0)), keep, captions, recipe)
    logits = 2 * image @ text.T
    kept = [[0, 2], [1, 2], [0, 1, 2]]
    rows = [torch.logsumexp(logits[i, kept[i]], 0) - logits[i, i] for i in range(3)]
    columns = [torch.logsumexp(logits[kept[i], i], 0) - logits[i, i] for i in range(3)]
    assert loss.item() == pytest.approx(sum(rows + columns).item() / 6, rel=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stacked_trainings_equal_trainings_one_by_one(
    setting: tuple[torch.nn.Module, Checkpoint, PairBatch, PairBatch], optimizer: str
) -> None:
    model, start, data, target = setting
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(step))[:16] for step in range(4)])
    rule = StepRule(optimizer, decay_of_each(start.params, 0.1))
    recipe = Recipe(order, [0.01, 0.02, 0.02, 0.01], rule)
    masks = torch.ones(2, 24, dtype=torch.float64)
    masks[1, [3, 11]] = 0
    states = []
    stacked = train_masked(
        model,
        start,
        data,
        masks,
        recipe,
        at_step=lambda t, p, f, s: states.append(checkpoint_of(1, t, 0.0, p, f, s, start, rule)),
    )
    losses = target_losses(model, stacked, start.buffers, target, recipe)
    for row, mask in enumerate(masks):
        params = {name: value.clone().requires_grad_() for name, value in start.params.items()}
        decay = [p for p in params.values() if p.ndim > 1]
        plain = [p for p in params.values() if p.ndim <= 1]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.1}]
        if optimizer == "sgd":
            # torch's SGD couples the decay to the gradient; ours is decoupled, as AdamW's
            reference = torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=1.0)
        else:
            reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-6)
        for rows, rate in zip(order, recipe.rates, strict=True):
            kept = data[rows[mask[rows].bool()]]
            for group in reference.param_groups:
                group["lr"] = rate
            reference.zero_grad()
            features = functional_call(model, {**params, **start.buffers}, (kept.images, kept.tokens))
            masked_loss(features, torch.ones(len(kept), dtype=torch.float64), kept.captions, recipe).backward()
            if optimizer == "sgd":
                with torch.no_grad():
                    for value in decay:
                        value.mul_(1 - rate * 0.1)
            reference.step()
        for name, value in params.items():
            torch.testing.assert_close(stacked[name][row], value.detach(), rtol=1e-9, atol=1e-11)
        features = functional_call(model, {**params, **start.buffers}, (target.images, target.tokens))
        everyone = torch.ones(len(target), dtype=torch.float64)
        expected = masked_loss(features, everyone, target.captions, recipe)
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-9)
    assert [state.step for state in states] == [1, 2, 3, 4]
    assert (states[-1].adam is None) == (optimizer == "sgd")
    assert all(torch.equal(states[-1].params[name], stacked[name][1]) for name in stacked)


def test_the_outcome_of_a_training_may_be_the_margin(
    setting: tuple[torch.nn.Module, Checkpoint, PairBatch, PairBatch],
) -> None:
    model, start, _, target = setting
    stacked = {name: torch.stack([value, value]) for name, value in start.params.items()}
    stacked["logit_scale"][1] += 1
    recipe = Recipe(torch.arange(24)[None], [0.1], RULE, target_loss="margin")
    cool, hot = target_losses(model, stacked, start.buffers, target, recipe)
    assert cool == hot, "the same features"
    image, text, *_ = functional_call(model, start.params | start.buffers, (target.images, target.tokens))
    cosines = image @ text.T
    assert float(cool) == pytest.approx(float(cosines.mean() - cosines.diagonal().mean()), rel=1e-9)


def test_equal_captions_option_reaches_the_training(
    setting: tuple[torch.nn.Module, Checkpoint, PairBatch, PairBatch],
) -> None:
    model, start, data, _ = setting
    recipe = Recipe(torch.arange(24)[None], [0.1], RULE)
    masks = torch.ones(1, 24, dtype=torch.float64)
    usual = train_masked(model, start, data, masks, recipe)
    ignoring = train_masked(model, start, data, masks, replace(recipe, ignore_equal_captions=True))
    assert any(not torch.equal(usual[name], ignoring[name]) for name in usual)
