"""The margin of a target: the contrastive loss without the model's confidence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from pipeline.influence import Settings
from pipeline.influence.local import LocalView
from pipeline.influence.losses import batch_loss, margin_loss
from pipeline.types import Features
from tests.influence.test_diff_in import make_case


def test_it_is_what_the_contrastive_loss_becomes_at_a_high_temperature():
    torch.manual_seed(0)
    image, text = (normalize(torch.randn(6, 4, dtype=torch.float64), dim=1) for _ in range(2))
    scale = torch.tensor(1e-5, dtype=torch.float64)
    features = Features(image, text, scale, torch.zeros_like(scale))
    everyone = torch.zeros(6, 6, dtype=torch.bool)
    slope = (batch_loss(features, everyone, "clip") - math.log(6)) / scale
    assert float(margin_loss(features, everyone)) == pytest.approx(float(slope), rel=1e-4)


def test_pairs_that_are_no_negatives_do_not_count():
    eye = torch.eye(3, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    features = Features(eye, torch.stack([eye[0], eye[0], eye[2]]), one, one)
    alone = torch.zeros(3, 3, dtype=torch.bool)
    # Rows of cosines (1, 1, 0), (0, 0, 0), (0, 0, 1): means 2/3, 0, 1/3, of columns 1/3, 1/3, 1/3; the diagonal 2/3.
    assert float(margin_loss(features, alone)) == pytest.approx(1 / 3 - 2 / 3)
    alone[0, 1] = alone[1, 0] = alone[0, 0] = True  # the diagonal counts whatever it says
    assert float(margin_loss(features, alone)) == pytest.approx((1 / 2 + 0 + 1 / 3 + 1 / 2 + 0 + 1 / 3) / 6 - 2 / 3)


def test_directions_of_the_target_follow_it_and_those_of_training_do_not():
    settings = Settings(target_loss="margin")
    model, (checkpoint, *_), batches, _ = make_case(settings)
    margin, plain = (
        LocalView(model, checkpoint, batches, each) for each in (settings, replace(settings, target_loss="contrastive"))
    )
    hotter = {**margin.state, "logit_scale": margin.state["logit_scale"] + 1}
    assert margin.target_loss.value(margin.state) == margin.target_loss.value(hotter)
    assert plain.target_loss.value(plain.state) != plain.target_loss.value(hotter)
    assert not margin.target_loss.gradient(margin.state)["logit_scale"]
    assert margin.gradient_loss.value(margin.state) == plain.gradient_loss.value(margin.state)
