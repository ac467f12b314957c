"""Numbers and signs from hashes: they look random, and belong to what they were drawn for."""

from __future__ import annotations

import torch

from pipeline.influence.hashing import signed, uniform


def test_random_is_uniform_and_seeded():
    ids = torch.arange(20_000) - 10_000
    values = uniform(ids, 0)
    assert torch.equal(values, uniform(ids, 0))
    assert not torch.equal(values, uniform(ids, 1))
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    counts = torch.histc(values.float(), 10, 0, 1)
    assert (counts - 2000).abs().max() < 200


def test_signs_of_different_draws_have_nothing_to_do_with_each_other():
    tree = {"a": torch.ones(50, 100, dtype=torch.float64), "b": torch.ones(5000, dtype=torch.float64)}
    draws = [(seed, index) for seed in (0, 1) for index in (0, 1, 2, 62, 63, 64, 65, 128)]
    rows = torch.stack([torch.cat([value.flatten() for value in signed(tree, *draw).values()]) for draw in draws])
    assert torch.equal(rows.abs(), torch.ones_like(rows))
    # Standard deviations of what independent signs would give.
    assert (rows.mean(1) * 100).abs().max() < 4
    products = (rows @ rows.T / 100).fill_diagonal_(0)
    assert products.abs().max() < 4.5
    halves = (rows[:, :5000] * rows[:, 5000:]).sum(1) / 5000**0.5
    assert halves.abs().max() < 4


def test_signs_do_not_depend_on_the_order_of_the_names():
    tree = {"b": torch.randn(7), "a": torch.randn(3, 4), "c": torch.randn(())}
    found = signed(tree, 5, 70)
    again = signed(dict(sorted(tree.items())), 5, 70)
    for name, value in tree.items():
        assert torch.equal(found[name], again[name])
        assert torch.equal(found[name].abs(), value.abs())
