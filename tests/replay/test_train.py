"""The loop against training written out by hand, and what a step depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch.func import functional_call, grad

from pipeline.errors import StageError
from pipeline.influence.losses import batch_loss, similar_captions
from pipeline.models.checkpoint import excluded_from_decay
from pipeline.models.clip import split_state
from pipeline.replay.augment import RATIO, SCALE, crop_boxes, cropped
from pipeline.replay.schedule import TrainingSettings, data_order, learning_rates
from pipeline.replay.train import Trainer, step_pairs
from pipeline.types import Tree
from tests.replay.pairs import MODEL, Factory, MemoryPairs

# After pipeline.models.compat, which lets torchvision import:
from torchvision.transforms import RandomResizedCrop  # isort: skip

SETTINGS = TrainingSettings(steps=6, batch_size=8, lr=3e-3, warmup=0.3, weight_decay=0.3)


def make(folder: Path, settings: TrainingSettings, pairs: MemoryPairs | None = None, **model: Any) -> Trainer:
    pairs = pairs or MemoryPairs()
    return Trainer(Factory(folder, MODEL | model)(0), pairs, data_order(np.arange(len(pairs)), settings), settings)


def finish(trainer: Trainer) -> None:
    while trainer.step < trainer.settings.steps:
        trainer.advance()


def by_hand(trainer: Trainer) -> tuple[Tree, Tree, Tree]:
    """Parameters and the two moments (or the momentum) after all steps, from the formulas, in float64."""
    s = trainer.settings
    params, buffers = split_state(trainer.model)
    params = {k: v.clone().double() for k, v in params.items()}
    buffers = {k: v.double() if v.is_floating_point() else v for k, v in buffers.items()}
    first, second = ({k: torch.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for step, rate in enumerate(learning_rates(s)):
        batch = trainer.pairs.batch(trainer.order[step])

        def loss(tree: Tree, batch: Any = batch) -> torch.Tensor:
            features = functional_call(trainer.model, {**tree, **buffers}, (batch.images, batch.tokens))
            equal = similar_captions(batch.captions, batch.captions, s.equal_captions == "ignore")
            return batch_loss(features, equal, s.loss)

        g = grad(loss)(params)
        if s.grad_clip is not None:
            norm = torch.sqrt(sum((v**2).sum() for v in g.values()))  # type: ignore[arg-type]
            g = {k: v * min(1.0, s.grad_clip / (norm + 1e-6)) for k, v in g.items()}
        for k in params:
            params[k] = params[k] * (1 - rate * (0 if excluded_from_decay(k, params[k]) else s.weight_decay))
            if s.optimizer == "sgd":
                first[k] = g[k] if step == 0 else s.momentum * first[k] + g[k]
                params[k] = params[k] - rate * first[k]
            else:
                first[k] = s.beta1 * first[k] + (1 - s.beta1) * g[k]
                second[k] = s.beta2 * second[k] + (1 - s.beta2) * g[k] ** 2
                m, v = first[k] / (1 - s.beta1 ** (step + 1)), second[k] / (1 - s.beta2 ** (step + 1))
                params[k] = params[k] - rate * m / (v.sqrt() + s.eps)
    return params, first, second


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_clip": 0.5},
        {"loss": "siglip"},
        {"equal_captions": "ignore"},
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "grad_clip": 1.0},
    ],
)
def test_steps_equal_the_formulas(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = replace(SETTINGS, eps=1e-3, **changes)
    pairs = MemoryPairs(classes=6)
    bias = {"init_logit_bias": -1.0} if settings.loss == "siglip" else {}
    trainer = make(tmp_path, settings, pairs, **bias)
    trainer.model.double()
    params, first, second = by_hand(trainer)
    finish(trainer)
    made = trainer.checkpoint()
    assert (made.step, made.lr) == (6, learning_rates(settings)[-1])
    for k, value in params.items():
        torch.testing.assert_close(made.params[k], value, rtol=1e-9, atol=1e-12)
    if settings.optimizer == "adamw":
        assert made.adam is not None
        assert made.adam.steps == 6
        for k in params:
            torch.testing.assert_close(made.adam.exp_avg[k], first[k], rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(made.adam.exp_avg_sq[k], second[k], rtol=1e-8, atol=1e-14)
    elif settings.momentum:
        assert made.momentum is not None
        for k in params:
            torch.testing.assert_close(made.momentum[k], first[k], rtol=1e-8, atol=1e-12)
        assert made.gain == pytest.approx(1 / (1 - settings.momentum))
    else:
        assert made.momentum is None


def test_ignored_equal_captions_change_the_loss(tmp_path: Path) -> None:
    pairs = MemoryPairs(classes=3)
    losses = [
        make(tmp_path, replace(SETTINGS, equal_captions=choice), pairs).advance() for choice in ("negative", "ignore")
    ]
    assert losses[1] < losses[0]


def test_bfloat16_training_keeps_weights_and_losses_in_float32(tmp_path: Path) -> None:
    losses, after = [], []
    for precision in ("fp32", "bf16"):
        trainer = make(tmp_path, replace(SETTINGS, precision=precision, eps=1e-3))  # type: ignore[arg-type]
        begin = {name: value.clone() for name, value in split_state(trainer.model)[0].items()}
        losses.append([trainer.advance() for _ in range(6)])
        made = trainer.checkpoint()
        assert made.adam is not None
        assert {value.dtype for tree in (made.params, made.adam.exp_avg_sq) for value in tree.values()} == {
            torch.float32
        }
        after.append(torch.cat([(made.params[name] - begin[name]).flatten() for name in sorted(begin)]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*after, dim=0) > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_restored_trainer_goes_on_bit_by_bit(tmp_path: Path, optimizer: Any, precision: Any) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, momentum=0.9, augment=True, precision=precision)
    whole, cut = make(tmp_path, settings), make(tmp_path, settings)
    for _ in range(3):
        whole.advance()
        cut.advance()
    fresh = make(tmp_path, settings)
    fresh.restore(cut.checkpoint())
    assert [whole.advance() for _ in range(3)] == [fresh.advance() for _ in range(3)]
    for left, right in zip(whole.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(left, right)


class Broken(MemoryPairs):
    """Pairs of which the batch number `broken`, from 1, cannot be read."""

    def __init__(self, broken: int) -> None:
        super().__init__()
        self.broken = broken
        self.batches = 0

    def batch(self, rows: Any) -> Any:
        self.batches += 1
        if self.batches == self.broken:
            raise OSError("the disk is gone")
        return super().batch(rows)


@pytest.mark.parametrize("augment", [False, True])
def test_steps_see_their_own_pairs_whichever_step_training_goes_on_from(tmp_path: Path, augment: bool) -> None:
    settings = replace(SETTINGS, augment=augment)
    trainer = make(tmp_path, settings)
    seen: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.advance()
    first = trainer.checkpoint()
    finish(trainer)
    trainer.restore(first)
    finish(trainer)
    for step, images in zip([*range(6), *range(1, 6)], seen, strict=True):
        assert torch.equal(images, step_pairs(trainer.pairs, trainer.order, settings, step).images)


@pytest.mark.parametrize("broken", [1, 4])
def test_a_batch_that_cannot_be_read_ends_training_at_its_step(tmp_path: Path, broken: int) -> None:
    trainer = make(tmp_path, replace(SETTINGS, augment=True), Broken(broken))
    with pytest.raises(OSError, match="the disk is gone"):
        finish(trainer)
    assert trainer.step == broken - 1


def test_a_step_whose_loss_is_not_finite_is_not_counted(tmp_path: Path) -> None:
    trainer = make(tmp_path, SETTINGS)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(torch.nan)
    with pytest.raises(StageError, match=r"step 1 of 6.*loss is nan"):
        trainer.advance()
    assert trainer.step == 0


def test_the_loss_is_read_when_the_optimizer_has_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read it waits for a GPU, which would then have nothing to do."""
    trainer, events = make(tmp_path, SETTINGS), list[str]()
    step, read = trainer._optimizer.step, torch.Tensor.__float__
    monkeypatch.setattr(trainer._optimizer, "step", lambda: (events.append("step"), step())[1])
    monkeypatch.setattr(torch.Tensor, "__float__", lambda value: (events.append("read"), read(value))[1])
    trainer.advance()
    assert events == ["step", "read"]


def test_dropout_is_this_steps_own_and_leaves_global_randomness_alone(tmp_path: Path) -> None:
    vision = MODEL["vision_cfg"] | {"patch_dropout": 0.5}  # type: ignore[operator]
    first, again = (make(tmp_path, SETTINGS, vision_cfg=vision) for _ in range(2))
    assert not first.model.trains_as_it_evaluates
    before = torch.random.get_rng_state()
    losses = [first.advance() for _ in range(3)]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert losses == [again.advance() for _ in range(3)]
    assert not first.model.training
    assert losses[0] != make(tmp_path, SETTINGS).advance()


def test_a_parameter_out_of_reach_decays_and_keeps_a_state(tmp_path: Path) -> None:
    trainer = make(tmp_path, SETTINGS)
    trainer.model.register_parameter("idle", torch.nn.Parameter(torch.ones(2, 2)))
    trainer = Trainer(trainer.model, trainer.pairs, trainer.order, SETTINGS)
    trainer.advance()
    made = trainer.checkpoint()
    assert made.params["idle"].tolist() == torch.full((2, 2), 1 - made.lr * 0.3).tolist()
    assert made.adam is not None
    assert not made.adam.exp_avg["idle"].any()


def test_divergence_says_where_and_what_to_do(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=40, lr=1e30, optimizer="sgd", run=3)
    trainer = make(tmp_path, settings)
    with pytest.raises(StageError, match=r"run 3, step \d+ of 40, learning rate .*proxy\.lr") as caught:
        finish(trainer)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_never_recorded(tmp_path: Path) -> None:
    trainer = make(tmp_path, SETTINGS)
    trainer.advance()
    with torch.no_grad():
        trainer.model.logit_scale.fill_(torch.nan)
    with pytest.raises(StageError, match="weights are not finite"):
        trainer.checkpoint()


def test_crops_are_distributed_as_torchvisions() -> None:
    boxes = np.concatenate([crop_boxes(0, 0, step, 100, (64, 64)) for step in range(20)])
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(2000)])
    for column in range(4):
        assert ks_2samp(boxes[:, column], theirs[:, column]).pvalue > 1e-3
    assert (boxes[:, 0] + boxes[:, 2] <= 64).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 64).all()


def test_crops_of_images_that_are_far_from_square_still_fit() -> None:
    top, left, tall, wide = crop_boxes(0, 0, 0, 200, (64, 16)).T
    assert (top + tall <= 64).all()
    assert (left + wide <= 16).all()


def test_a_full_box_leaves_the_image_and_crops_differ_by_run_step_and_place() -> None:
    images = MemoryPairs(3).all.images
    full = np.tile([0, 0, 16, 16], (3, 1))
    assert torch.equal(cropped(images, full), images)
    boxes = crop_boxes(0, 0, 0, 24, (16, 16))
    assert torch.equal(cropped(MemoryPairs().all.images, boxes), cropped(MemoryPairs().all.images, boxes, threads=3))
    assert cropped(images, crop_boxes(0, 0, 0, 3, (16, 16))).dtype == torch.uint8
    seen = {crop_boxes(seed, run, step, 8, (64, 64)).tobytes() for seed in (0, 1) for run in (0, 1) for step in (0, 1)}
    assert len(seen) == 8


def test_a_workers_part_is_cut_from_the_whole_batchs_crops() -> None:
    pairs, settings = MemoryPairs(), replace(SETTINGS, augment=True)
    order = data_order(np.arange(24), settings)
    whole = step_pairs(pairs, order, settings, 2)
    part = step_pairs(pairs, order, settings, 2, slice(4, 8))
    assert torch.equal(whole.images[4:], part.images)
    assert torch.equal(whole.ids[4:], part.ids)
    assert not torch.equal(whole.images, pairs.batch(order[2]).images)
