"""On a GPU scores and training are those of the CPU, and what is copied ahead is what was sent; skipped without one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from pipeline.influence import Scorer, Settings, fused, prepare_run
from pipeline.influence.arithmetic import arithmetic
from pipeline.influence.transfers import on_device
from pipeline.replay.schedule import TrainingSettings, data_order
from pipeline.replay.train import Trainer
from tests.benchmarks.attention import by_torch
from tests.benchmarks.models import two_checkpoints
from tests.influence.test_devices import trainer_of, training_that_moves
from tests.replay.pairs import MODEL, Factory, MemoryPairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = "cuda"

#: The least rank correlation with float32 at which a lower precision may be used.
INTACT = 0.99

#: Every estimator and form, with the largest error relative to the largest score. Differences of losses divide rounding
#: errors by their steps: on a CPU alone, parts of 7 pairs instead of 24 leave a correlation of 0.991 of `diff-in`.
FORMS = {
    "tracin": (Settings(estimator="tracin"), 1e-3),
    "tracin by losses": (Settings(estimator="tracin", method="forward"), 2e-2),
    "diff-in": (Settings(method="central"), 1e-2),
    "diff-in exact": (Settings(method="exact"), 1e-3),
    "diff-in by losses": (Settings(method="forward"), 1e-1),
    "moso": (Settings(estimator="moso"), 1e-3),
    "unrolled": (Settings(estimator="unrolled"), 1e-2),
    "z0": (Settings(estimator="z0"), 1e-2),
    "diff-in-self": (Settings(estimator="diff-in-self", projections=4, eigenpairs=2), 5e-2),
    "tracin-self": (Settings(estimator="tracin-self", projections=18), 1e-3),
    "grand": (Settings(estimator="grand", projections=4), 1e-3),
    "grand exact": (Settings(estimator="grand", self_form="exact"), 1e-3),
    "el2n": (Settings(estimator="el2n"), 1e-4),
    "clip-score": (Settings(estimator="clip-score"), 1e-4),
    "neg-clip-loss": (Settings(estimator="neg-clip-loss"), 1e-4),
    "random": (Settings(estimator="random"), 1e-12),
}


@pytest.fixture(scope="module")
def case():
    """Two checkpoints of a briefly trained model, batches, and pairs to score."""
    return two_checkpoints()


def scores(case, settings, device, plans=None):
    """Scores of the pairs, float64 `[b]`, and the plans they were computed with."""
    model, checkpoints, batches, pairs = case
    model.to(device)
    if plans is None:
        plans = prepare_run(model, checkpoints, batches, settings, dataset_size=256)
    scorer = Scorer(model, list(zip(checkpoints, plans, strict=True)), batches.reference, settings, device, 24)
    found = scorer.score(pairs)
    assert found.terms.device.type == found.embedding.device.type == "cpu"
    return found.terms.double().sum(1), plans


def assert_same(found, expected, error):
    assert spearmanr(found, expected)[0] >= (0.999 if error < 0.1 else 0.95)
    assert float((found - expected).abs().max() / expected.abs().max()) < error


@pytest.mark.parametrize(("settings", "error"), FORMS.values(), ids=FORMS)
def test_float32_scores_are_those_of_the_cpu(case, settings, error):
    """Passes alone, along directions of the CPU; then directions of the GPU as well."""
    expected, plans = scores(case, settings, "cpu")
    assert_same(scores(case, settings, GPU, plans)[0], expected, error)
    assert_same(scores(case, settings, GPU)[0], expected, 2 * error)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_lower_precision_leaves_the_ranking_intact(case, form, precision, record_property):
    """Reported: a form that loses the ranking is an expected failure that says by how much."""
    settings, _ = FORMS[form]
    expected, _ = scores(case, settings, GPU)
    found, _ = scores(case, replace(settings, precision=precision), GPU)
    assert bool(found.isfinite().all())
    value = float(spearmanr(found, expected)[0])
    record_property("spearman", value)
    if value < INTACT:
        pytest.xfail(f"{form} in {precision}: Spearman {value:.4f} to float32, below {INTACT}")


@pytest.mark.parametrize(("precision", "error"), [("tf32", 6e-3), ("bf16", 1.5e-2)])
@pytest.mark.parametrize(
    ("heads", "tokens", "width"), [(12, 50, 64), (8, 77, 64), (3, 197, 32), (2, 13, 24), (1, 5, 128)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_tangent_in_one_kernel(precision, error, heads, tokens, width, masked):
    """Of slices of packed projections, with a large common shift of the logits, against torch's own in float64."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    packed = torch.randn(2, 3, tokens, 3, heads, width, generator=torch.Generator().manual_seed(0)).to(GPU, dtype)
    packed[1, :, :, 1] += 4  # moves all logits of a query alike, which the weights do not see
    mask = torch.full((tokens, tokens), -torch.inf, device=GPU, dtype=dtype).triu(1) if masked else None
    parts = [part.transpose(1, 2) for dual in packed for part in dual.unbind(2)]
    with arithmetic(precision):
        assert fused.takes_attention(parts, mask)
        found = fused.attention_with_tangent(parts, mask, width**-0.5)
    at, along = (dict(zip("qkv", [p.double() for p in some], strict=True)) for some in (parts[:3], parts[3:]))
    expected = by_torch((at, along, None if mask is None else mask.double()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).abs().max() / other.abs().max()) < error


@pytest.mark.parametrize("width", [24, 512, 768, 1664])
def test_layer_norm_and_its_tangent_in_one_kernel(width):
    x, dx = 3 + torch.randn(2, 50, 7, width, device=GPU).transpose(1, 2)
    parameters = torch.randn(4, width, device=GPU)
    assert fused.takes_norm([x, dx], list(parameters))
    expected = torch.func.jvp(
        lambda x, w, b: functional.layer_norm(x, (width,), w, b, 1e-5),
        (x.double(), *parameters[:2].double()),
        (dx.double(), *parameters[2:].double()),
    )
    for one, other in zip(fused.norm_with_tangent([x, dx], list(parameters), 1e-5), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_gelu_and_its_tangent_in_one_kernel(dtype, error):
    x, dx = (3 * torch.randn(2, 1000, 77, device=GPU)).to(dtype)
    assert fused.takes_gelu([x, dx])
    expected = torch.func.jvp(functional.gelu, (x.double(),), (dx.double(),))
    for one, other in zip(fused.gelu_with_tangent([x, dx]), expected, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).abs().max() / other.abs().max()) < error


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(
    "settings", [Settings(estimator="tracin"), Settings(method="central")], ids=["tracin", "diff-in"]
)
def test_compiled_passes_give_the_same_scores(case, settings, precision):
    model, checkpoints, batches, pairs = case
    settings = replace(settings, precision=precision)
    expected, plans = scores(case, settings, GPU)
    parts = list(zip(checkpoints, plans, strict=True))
    scorer = Scorer(model, parts, batches.reference, settings, GPU, 24, compiled=True)
    found = scorer.score(pairs).terms.double().sum(1)
    assert spearmanr(found, expected)[0] >= (0.999 if precision == "fp32" else INTACT)
    assert float((found - expected).abs().max() / expected.abs().max()) < (1e-2 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("first", "second"), [("cpu", GPU), (GPU, "cpu"), (GPU, GPU)])
def test_training_and_its_checkpoints_cross_devices(tmp_path, optimizer, first, second):
    settings = TrainingSettings(
        steps=6, batch_size=8, lr=3e-3, eps=1e-3, optimizer=optimizer, momentum=0.9, augment=True, grad_clip=0.5
    )
    whole = trainer_of(tmp_path, settings, "cpu")
    expected = [whole.advance() for _ in range(6)]
    losses, after = training_that_moves(tmp_path, settings, first, second)
    assert losses == pytest.approx(expected, rel=1e-4)
    found, params = after.checkpoint().params, whole.checkpoint().params
    for name, value in params.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_training_in_lower_precision_learns_the_same(tmp_path, precision):
    settings = TrainingSettings(steps=6, batch_size=8, lr=3e-3, eps=1e-3)
    whole, lower = (trainer_of(tmp_path, replace(settings, precision=p), GPU) for p in ("fp32", precision))
    losses = [[trainer.advance() for _ in range(6)] for trainer in (whole, lower)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert {value.dtype for value in lower.checkpoint().params.values()} == {torch.float32}


def test_passes_that_the_memory_does_not_hold_are_halved(case):
    """Against a cap on the memory, so that other work on the GPU is left alone."""
    model, checkpoints, batches, pairs = case
    settings = Settings(estimator="tracin")
    expected, plans = scores(case, settings, GPU)
    many = pairs[torch.arange(len(pairs)).repeat(64)]
    scorer = Scorer(model, list(zip(checkpoints, plans, strict=True)), batches.reference, settings, GPU, 1024)
    torch.cuda.empty_cache()
    used, whole = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + 32 * 2**20) / whole)
    try:
        found = scorer.score(many).terms.double().sum(1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scorer.batch_size < 1024
    assert_same(found[: len(pairs)], expected, 1e-3)


def test_what_is_copied_ahead_is_what_was_sent():
    """Many small parts, each overwritten as soon as it was used, beside work that keeps the GPU behind."""
    pairs, order = MemoryPairs(2000).all, torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    busy = torch.randn(2048, 2048, device=GPU)
    sums, ids = [], []
    for part in on_device(pairs, order, 16, torch.device(GPU)):
        for _ in range(4):
            busy = (busy @ busy).softmax(1)
        sums.append(part.images.flatten(1).long().sum(1))
        ids.append(part.ids.clone())
        for name in part.__slots__:
            getattr(part, name).zero_()
    torch.testing.assert_close(torch.cat(ids).cpu(), pairs.ids[order])
    torch.testing.assert_close(torch.cat(sums).cpu(), pairs.images[order].flatten(1).long().sum(1))


def test_scores_do_not_depend_on_how_pairs_are_copied(case, monkeypatch):
    settings = Settings(estimator="tracin")
    expected, plans = scores(case, settings, GPU)
    monkeypatch.setattr("pipeline.influence.scorer._BLOCK", 7)
    assert_same(scores(case, settings, GPU, plans)[0], expected, 1e-4)


def test_a_step_with_dropout_draws_its_own_numbers_on_the_gpu(tmp_path):
    settings = TrainingSettings(steps=2, batch_size=8, lr=1e-3)
    vision = MODEL["vision_cfg"] | {"patch_dropout": 0.5}
    pairs, losses = MemoryPairs(), []
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        before = torch.cuda.get_rng_state()
        model = Factory(tmp_path, MODEL | {"vision_cfg": vision})(0)
        trainer = Trainer(model, pairs, data_order(np.arange(24), settings), settings, GPU)
        losses.append([trainer.advance() for _ in range(2)])
        assert torch.equal(before, torch.cuda.get_rng_state())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
