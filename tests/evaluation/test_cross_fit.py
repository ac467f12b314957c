"""Cross-validation of predicted scores: it says what fresh pairs then show, and prefers what predicts better."""

from __future__ import annotations

import torch

from pipeline.evaluation.correlation import spearman
from pipeline.evaluation.cross_fit import cross_fit
from tests.influence.test_regressor import planted, seen


def noisy(pairs: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    terms = planted(seen(pairs, seed=seed))
    return terms + noise * terms.std(0) * torch.randn(terms.shape, generator=draw), torch.rand(pairs, generator=draw)


def test_the_correlation_stated_is_that_of_fresh_pairs_and_rises_with_the_share() -> None:
    terms, draws = noisy(800, 1.0, 0)
    regressor, found = cross_fit(seen(800), terms, [0, 0], draws, share=0.1, seed=0)
    assert [round(point.share, 2) for point in found.curve] == [0.01, 0.02, 0.04, 0.08]
    assert [point.pairs for point in found.curve] == sorted(point.pairs for point in found.curve)
    correlations = [point.correlation for point in found.curve]
    assert correlations[0] < correlations[-1]
    assert found.curve[-1].low < correlations[-1] < found.curve[-1].high
    fresh, _ = noisy(2000, 1.0, 1)
    predicted = regressor.predict(seen(2000, seed=1)).sum(1)
    measured = spearman(predicted.numpy(), fresh.sum(1).numpy())
    assert found.curve[-1].low < measured < found.curve[-1].high + 0.02
    error = float((predicted - fresh.sum(1)).square().mean().sqrt())
    assert abs(error - found.error) < 0.05 * error
    assert found.to_dict()["curve"][-1]["correlation"] == correlations[-1]


def test_noise_is_not_predicted() -> None:
    draw = torch.Generator().manual_seed(0)
    terms, draws = torch.randn(500, 1, generator=draw), torch.rand(500, generator=draw)
    _, found = cross_fit(seen(500), terms, [0], draws, share=0.1, seed=0)
    assert abs(found.curve[-1].correlation) < 0.15


def test_the_network_is_taken_where_it_predicts_better() -> None:
    pairs = seen(1200, size=4)
    x = pairs.features(0).double()
    draws = torch.rand(1200, generator=torch.Generator().manual_seed(0))
    _, bent = cross_fit(pairs, (x[:, 0] * x[:, 1])[:, None], [0], draws, share=0.1, seed=0)
    assert bent.kind == "ridge and network"
    few = seen(200)
    terms, draws = noisy(200, 1.0, 0)
    _, plain = cross_fit(few, terms, [0, 0], draws, share=0.1, seed=0)
    assert plain.kind == "ridge"
