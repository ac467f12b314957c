"""The regressor finds what is planted in embeddings, ignores outliers and unknown terms, and survives storage."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import InputError
from pipeline.influence import Observed, Regressor, fit, scaled_up


def seen(pairs: int, runs: int = 1, size: int = 8, seed: int = 0) -> Observed:
    draw = torch.Generator().manual_seed(seed)
    sides = torch.randn(pairs, runs, 2, size, generator=draw)
    embedding = (sides / sides.norm(dim=3, keepdim=True)).flatten(2).half()
    counts = torch.ones(pairs, runs, dtype=torch.bool)
    return Observed(embedding, counts, torch.rand(pairs, generator=draw), torch.rand(pairs, generator=draw))


def planted(pairs: Observed, run: int = 0) -> torch.Tensor:
    """Linear in image, product and loss, two terms of different scale."""
    x = pairs.features(run).double()
    return torch.stack([3 * x[:, 0] + x[:, 16] + x[:, -2], 1e-4 * (x[:, 1] - 2 * x[:, 20]) + 5], 1)


def test_features_are_image_text_product_loss_and_similarity() -> None:
    pairs = seen(3, runs=2)
    image, text = pairs.embedding[:, 1].float().chunk(2, 1)
    expected = torch.cat([image, text, image * text, pairs.loss[:, None], pairs.similarity[:, None]], 1)
    assert torch.equal(pairs.features(1), expected)


@pytest.mark.parametrize("pairs", [20, 400])
def test_a_linear_score_is_found_with_fewer_and_with_more_pairs_than_features(pairs: int) -> None:
    known, new = seen(pairs), seen(200, seed=1)
    found = fit(known, planted(known), [0, 0]).predict(new)
    assert found.dtype == torch.float64
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found.T, planted(new).T)])  # noqa: B905
    assert (correlation > (0.995 if pairs == 400 else 0.3)).all()


def test_outliers_hardly_move_the_fit() -> None:
    known, new = seen(400), seen(200, seed=1)
    terms = planted(known)
    spoilt = terms.clone()
    spoilt[::150] = 1e6
    clean, other = fit(known, terms, [0, 0]).predict(new), fit(known, spoilt, [0, 0]).predict(new)
    assert torch.corrcoef(torch.stack([clean[:, 0], other[:, 0]]))[0, 1] > 0.9


def test_a_network_finds_what_is_not_linear() -> None:
    known, new = seen(1200, size=4), seen(500, size=4, seed=1)

    def bent(pairs: Observed) -> torch.Tensor:
        x = pairs.features(0).double()
        return (x[:, 0] * x[:, 1] + x[:, 0])[:, None]

    def error(network: bool) -> float:
        return float((fit(known, bent(known), [0], network=network).predict(new) - bent(new)).square().mean())

    assert error(network=True) < 0.5 * error(network=False)


def test_each_run_is_predicted_from_its_own_embedding_and_from_the_pairs_it_has_terms_of() -> None:
    known, new = seen(600, runs=2), seen(100, runs=2, seed=1)
    terms = torch.cat([planted(known, 0)[:, :1], planted(known, 1)[:, :1]], 1)
    terms[::2, 0] = torch.nan
    terms[1::3, 1] = torch.nan
    found = fit(known, terms, [0, 1]).predict(new)
    for run in (0, 1):
        assert torch.corrcoef(torch.stack([found[:, run], planted(new, run)[:, 0]]))[0, 1] > 0.99
    terms[:, 1] = torch.nan
    with pytest.raises(InputError, match="expected two scored pairs or more of each proxy run, found 0 of one"):
        fit(known, terms, [0, 1])


def test_runs_that_do_not_count_are_left_out_and_the_others_stand_for_all() -> None:
    known, new = seen(600, runs=2), seen(4, runs=2, seed=1)
    terms = torch.cat([planted(known, 0)[:, :1], planted(known, 1)[:, :1]], 1)
    regressor = fit(known, terms, [0, 1])
    all_of_them = regressor.predict(new)
    new.counts = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    found = scaled_up(regressor.predict(new), [0, 1])
    assert torch.equal(found.isfinite(), new.counts)
    assert torch.equal(found[0], all_of_them[0])
    assert found[1, 0] == 2 * all_of_them[1, 0]
    assert found[2, 1] == 2 * all_of_them[2, 1]


@pytest.mark.parametrize("network", [False, True])
def test_it_is_the_same_every_time_and_after_storage(network: bool) -> None:
    known, new = seen(100), seen(10, seed=1)
    first, again = (fit(known, planted(known), [0, 0], network=network, seed=3) for _ in range(2))
    stored = Regressor.from_tensors(*first.to_tensors())
    assert torch.equal(first.predict(new), again.predict(new))
    assert torch.equal(first.predict(new), stored.predict(new))
