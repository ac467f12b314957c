"""How many pairs go through the model at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.influence.passes import pass_size
from pipeline.types import Features
from tests.influence.towers import SmallTowers, make_pairs


class Wide(nn.Module):
    """Its image tower's one layer gives that many float32 values per pair."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.visual = nn.Linear(12, values)

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        assert not self.training
        image = self.visual(images.flatten(1).float())
        one = image.new_ones(())
        return Features(image[:, :3], tokens[:, :3].float(), one, one)


@pytest.mark.parametrize(("values", "pairs"), [(100, 128), (20_000, 64), (32_768, 64), (40_000, 32), (500_000, 32)])
def test_on_a_cpu_passes_are_as_small_as_large_activations_ask_for(values: int, pairs: int) -> None:
    model = Wide(values)
    assert pass_size(1000, model, make_pairs(3, 0)) == pairs
    assert pass_size(20, model, make_pairs(3, 0)) == 20
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


def test_elsewhere_passes_are_as_large_as_wanted() -> None:
    there = make_pairs(3, 0).to(torch.device("meta"))
    assert pass_size(1000, SmallTowers(), there) == 1000
