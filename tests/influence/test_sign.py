"""Utility has the sign that keeps helpful pairs, by training again without each pair."""

from __future__ import annotations

import torch
from scipy.stats import spearmanr

from pipeline.influence import Batches, Replay, Scorer, Settings, StepRule, prepare_run, utility_of
from pipeline.types import Checkpoint, PairBatch
from tests.influence.towers import SmallTowers, make_pairs, mean_loss, state_of

STEPS, RATE, RECORDED = 40, 0.02, (5, 15, 25, 35)


def matching_pairs(count, seed, wrong):
    """Pairs whose caption tells which channel is bright; the first `wrong` captions name another one."""
    pairs = make_pairs(count, seed, first_id=1000 * seed)
    generator = torch.Generator().manual_seed(seed)
    channel = torch.randint(0, 3, (count,), generator=generator)
    images = pairs.images // 3
    images[torch.arange(count), channel] += 150
    named = channel.clone()
    named[:wrong] = (channel[:wrong] + 1) % 3
    tokens = torch.cat([named[:, None].expand(-1, 2) + 1, pairs.tokens[:, 2:].clamp(4)], 1)
    return PairBatch(images, tokens, pairs.ids, pairs.captions)


def train(model, pairs):
    params = state_of(model)
    states = [params]
    for _ in range(STEPS):
        params = {name: value.requires_grad_() for name, value in params.items()}
        grads = torch.autograd.grad(mean_loss(model, params, pairs, Settings()), list(params.values()))
        params = {n: (p - RATE * g).detach() for (n, p), g in zip(params.items(), grads, strict=True)}
        states.append({name: value.detach().clone() for name, value in params.items()})
    return states


def test_utility_ranks_pairs_as_training_without_them_does():
    model = SmallTowers(seed=4)
    pool, target = matching_pairs(48, 1, wrong=14), matching_pairs(40, 2, wrong=0)
    states = train(model, pool)
    final = mean_loss(model, states[-1], target, Settings())
    left_out = range(0, len(pool), 2)
    kept = [torch.arange(len(pool)) != index for index in left_out]
    usefulness = [float(mean_loss(model, train(model, pool[k])[-1], target, Settings()) - final) for k in kept]
    checkpoints = [Checkpoint(step, RATE, 0, states[step], {}) for step in RECORDED]
    checkpoints.append(Checkpoint(STEPS, RATE, 0, states[STEPS], {}))
    replay = Replay(StepRule("sgd", {}), [RATE] * STEPS, lambda step: pool, Checkpoint(0, 0.0, 0, states[0], {}))
    found = {}
    for estimator, how in (
        ("diff-in", "exact"),
        ("tracin", "exact"),
        ("unrolled", "exact"),
        ("unrolled", "checkpoints"),
    ):
        settings = Settings(estimator=estimator, replay=how)
        batches = Batches(pool, pool, target)
        plans = prepare_run(model, checkpoints, batches, settings, dataset_size=len(pool), replay=replay)
        scorer = Scorer(model, list(zip(checkpoints, plans, strict=True)), pool, settings)
        utility = utility_of(estimator, scorer.score(pool).terms.sum(1))
        found[f"{estimator} {how}"] = float(spearmanr(utility[list(left_out)], usefulness)[0])
    assert found["unrolled exact"] > 0.95, found
    assert found["unrolled checkpoints"] > 0.9, found
    assert min(found.values()) > 0.3, found
