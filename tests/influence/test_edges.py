"""What has no direction gives no influence, and what the model or the checkpoint cannot give is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.errors import InputError
from pipeline.influence import Scorer, Settings, prepare, prepare_run
from pipeline.influence.local import preconditioner
from tests.influence.test_diff_in import assert_close, make_case, score
from tests.influence.towers import make_pairs


@pytest.mark.parametrize(
    ("estimator", "method"),
    [("tracin", "exact"), ("tracin", "forward"), ("diff-in", "exact"), ("diff-in", "central"), ("unrolled", "exact")],
)
def test_a_target_without_a_gradient_gives_no_influence(estimator, method):
    """One pair alone has no negatives: its loss is zero whatever the parameters are."""
    settings = Settings(estimator=estimator, method=method)
    model, checkpoints, batches, pairs = make_case(settings)
    alone = replace(batches, target=make_pairs(1, seed=7, first_id=900))
    plans = prepare_run(model, checkpoints, alone, settings, dataset_size=40)
    terms = Scorer(model, list(zip(checkpoints, plans, strict=True)), alone.reference, settings).score(pairs).terms
    assert terms.shape == (len(pairs), len(checkpoints))
    assert terms.abs().max() < 1e-12


def test_tracin_from_losses_alone_is_that_from_a_tangent_pass():
    found = []
    for method in ("exact", "forward"):
        settings = Settings(estimator="tracin", method=method)
        found.append(score(*make_case(settings), settings).terms)
    assert found[0].abs().max() > 0
    assert_close(found[1], found[0], 1e-5)


def test_a_batch_without_pairs_is_refused():
    settings = Settings(estimator="tracin")
    model, checkpoints, batches, pairs = make_case(settings)
    with pytest.raises(InputError, match="at least one pair"):
        score(model, checkpoints, batches, pairs[:0], settings)


def test_the_preconditioner_is_adams_or_none_or_refused():
    model, (checkpoint, *_), batches, _ = make_case(Settings())
    sgd = replace(checkpoint, adam=None)
    assert preconditioner(checkpoint, Settings(precondition="none")) is None
    assert preconditioner(sgd, Settings(precondition="auto")) is None
    assert set(preconditioner(checkpoint, Settings(precondition="auto"))) == set(checkpoint.params)
    with pytest.raises(InputError, match=f"checkpoint of step {sgd.step}: expected Adam's state"):
        prepare(model, sgd, batches, Settings(precondition="adam"), dataset_size=50, num_checkpoints=1)


def test_an_estimator_of_the_whole_run_is_refused_at_one_checkpoint():
    settings = Settings(estimator="unrolled")
    model, (checkpoint, *_), batches, _ = make_case(settings)
    with pytest.raises(InputError, match=r"unrolled needs all checkpoints of a run at once \(prepare_run\)"):
        prepare(model, checkpoint, batches, settings, dataset_size=50, num_checkpoints=1)
