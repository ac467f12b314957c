"""Rates, order and recorded steps against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.replay.schedule import (
    TrainingSettings,
    data_order,
    learning_rates,
    recorded_steps,
    runs_per_round,
    runs_to_hold_out,
    training_rows,
)
from tests.replay.pairs import config_of


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 200), warmup=st.floats(0, 0.99))
def test_rates_are_open_clips_cosine(steps: int, warmup: float) -> None:
    from open_clip_train.scheduler import cosine_lr

    class Optimizer:
        param_groups = [{"lr": 0.0}]  # noqa: RUF012

    plan = TrainingSettings(steps=steps, batch_size=1, lr=0.3, warmup=warmup)
    rates = learning_rates(plan)
    schedule = cosine_lr(Optimizer(), 0.3, round(warmup * steps), steps)
    assert rates == pytest.approx([schedule(step) for step in range(steps)], rel=1e-12)
    assert (rates > 0).all()


@settings(max_examples=50, deadline=None)
@given(pairs=st.integers(4, 40), steps=st.integers(1, 30), seed=st.integers(-5, 5))
def test_every_pass_is_a_permutation_and_no_batch_repeats_a_pair(pairs: int, steps: int, seed: int) -> None:
    rows = np.arange(100, 100 + pairs)
    plan = TrainingSettings(steps=steps, batch_size=4, seed=seed)
    order = data_order(rows, plan)
    assert order.shape == (steps, 4)
    per_pass = pairs // 4
    for start in range(0, steps, per_pass):
        seen = order[start : start + per_pass].ravel()
        assert len(set(seen.tolist())) == len(seen)
        assert set(seen.tolist()) <= set(rows.tolist())
    assert np.array_equal(order, data_order(rows, plan))


def test_runs_and_seeds_differ() -> None:
    rows = np.arange(64)
    orders = [
        data_order(rows, TrainingSettings(steps=8, batch_size=8, seed=seed, run=run))
        for seed in (0, 1)
        for run in (0, 1)
    ]
    assert len({order.tobytes() for order in orders}) == 4
    halves = [training_rows(rows, 0.5, seed=0, run=run) for run in (0, 1)]
    assert [len(half) for half in halves] == [32, 32]
    assert not np.array_equal(*halves)
    assert np.array_equal(training_rows(rows, 1.0, 0, 0), rows)
    assert all((np.diff(half) > 0).all() for half in halves)


@pytest.mark.parametrize("n", [64, 65, 67])
@pytest.mark.parametrize(
    ("share", "per_round", "fewest"),
    [(0.5, 2, 2), (0.67, 3, 3), (0.667, 3, 3), (0.75, 4, 4), (0.25, 4, 2), (0.3, 3, 2)],
)
def test_runs_of_a_round_complement_each_other(n: int, share: float, per_round: int, fewest: int) -> None:
    assert (runs_per_round(share), runs_to_hold_out(share)) == (per_round, fewest)
    rows = np.arange(100, 100 + n)
    for first in (0, per_round):
        parts = [training_rows(rows, share, seed=0, run=first + run) for run in range(per_round)]
        seen = np.stack([np.isin(rows, part) for part in parts])
        assert all(abs(len(part) - share * n) <= 1 + 0.01 * n for part in parts)
        # No pair is seen by so many runs that the fewest runs of which one must not know it are not enough.
        assert seen.sum(0).max() == (per_round - 1 if share > 0.5 else 1)
        if share > 0.5:
            assert seen.sum(0).min() == per_round - 2 + (n % per_round == 0) or seen.sum(0).min() == per_round - 1
    assert not np.array_equal(parts[0], training_rows(rows, share, seed=0, run=0))


def test_steps_come_from_epochs() -> None:
    config = config_of(steps=None, epochs=2.5, batch_size=8)
    assert TrainingSettings.of(config, pairs=39).steps == round(2.5 * 4)
    assert TrainingSettings.of(config_of(steps=None, epochs=0.01, batch_size=8), pairs=8).steps == 1


@pytest.mark.parametrize(("count", "steps", "expected"), [(3, 12, [4, 8, 12]), (4, 10, [2, 5, 8, 10]), (1, 7, [7])])
def test_even_checkpoints_end_with_the_last_step(count: int, steps: int, expected: list[int]) -> None:
    config = config_of(num_checkpoints=count, steps=steps)
    assert recorded_steps(config, TrainingSettings.of(config, 24)) == expected


def test_random_checkpoints_are_seeded_and_different() -> None:
    def drawn(seed: int, run: int) -> list[int]:
        config = config_of(num_checkpoints=5, steps=30, checkpoint_at="random", seed=seed)
        return recorded_steps(config, TrainingSettings.of(config, 24, run))

    assert drawn(0, 0) == drawn(0, 0)
    assert len({tuple(drawn(seed, run)) for seed in (0, 1) for run in (0, 1)}) == 4
    assert all(
        len(set(drawn(seed, 0))) == 5 and min(drawn(seed, 0)) >= 1 and max(drawn(seed, 0)) <= 30 for seed in range(9)
    )


def test_what_does_not_fit_names_its_key() -> None:
    def problem(pairs: int = 24, **proxy: object) -> str:
        config = config_of(**proxy)
        with pytest.raises(ConfigError) as caught:
            recorded_steps(config, TrainingSettings.of(config, pairs))
        return str(caught.value)

    assert "proxy.batch_size" in problem(pairs=7)
    assert "data.shards: expected pairs with image and caption" in problem(pairs=0)
    assert "proxy.workers" in problem(workers=3)
    assert "proxy.num_checkpoints" in problem(num_checkpoints=13)
    assert "proxy.checkpoint_at" in problem(checkpoint_at=[13])
    assert "proxy.checkpoint_at" in problem(checkpoint_at=[3, 3])
    config = config_of(checkpoint_at=[5, 2])
    assert recorded_steps(config, TrainingSettings.of(config, 24)) == [2, 5]


def test_rates_of_a_written_out_case() -> None:
    rates = learning_rates(TrainingSettings(steps=5, batch_size=1, lr=1.0, warmup=0.4))
    assert rates == pytest.approx(
        [0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 3)), 0.5 * (1 + math.cos(2 * math.pi / 3))]
    )
