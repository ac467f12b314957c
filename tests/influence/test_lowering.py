"""Passes in bfloat16: which products stay float32, and that rankings survive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.influence import Batches, Scorer, Settings, prepare, prepare_run
from pipeline.influence.passes import Passes
from pipeline.influence.tangents import TangentRules
from pipeline.influence.twice import TwiceDifferentiable
from pipeline.types import longest_caption
from tests.benchmarks.models import digit_pairs, small_model, trained_checkpoint, two_checkpoints
from tests.benchmarks.precision import FACTORS, Tf32
from tests.influence.test_models import make_model, pairs_of
from tests.influence.test_tangents import assert_same, random_like, tensors


@pytest.fixture(scope="module")
def trained():
    """A briefly trained model, its checkpoint, batches, and pairs to score."""
    model = small_model("digits-vit")
    pool = digit_pairs(model, 512)
    checkpoint = trained_checkpoint(model, pool[:256], 40)
    return model, checkpoint, Batches(pool[:32], pool[64:128], pool[256:320]), pool[384:]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(estimator="tracin"),
        Settings(method="central"),
        Settings(method="exact"),
        Settings(estimator="clip-score"),
        Settings(estimator="el2n"),
    ],
    ids=lambda settings: f"{settings.estimator} {settings.method}",
)
def test_a_ranking_survives_bfloat16(trained, settings):
    model, checkpoint, batches, pairs = trained
    found = []
    for precision in ("fp32", "bf16"):
        chosen = replace(settings, precision=precision)
        plan = prepare(model, checkpoint, batches, chosen, dataset_size=256, num_checkpoints=1)
        found.append(Scorer(model, [(checkpoint, plan)], batches.reference, chosen).score(pairs).terms[:, 0])
    assert not torch.equal(*found)
    assert spearmanr(*found)[0] >= 0.99


@pytest.fixture(scope="module")
def short_run():
    """Two checkpoints of a briefly trained model, batches, and pairs to score."""
    return two_checkpoints("digits-vit")


@pytest.mark.parametrize("estimator", ["tracin", "diff-in", "z0", "diff-in-self", "clip-score"])
def test_a_ranking_survives_tf32(short_run, estimator):
    """Emulated. With the losses' logits in tf32 those of `z0` and `diff-in-self` fall to 0.967 and 0.987."""
    model, checkpoints, batches, pairs = short_run
    settings = Settings(estimator=estimator, projections=4, eigenpairs=2)
    found = []
    for precision in ("fp32", "tf32"):
        chosen = replace(settings, precision=precision)
        plans = prepare_run(model, checkpoints, batches, chosen, dataset_size=256)
        with Tf32():
            parts = list(zip(checkpoints, plans, strict=True))
            found.append(Scorer(model, parts, batches.reference, chosen).score(pairs).terms.double().sum(1))
    assert not torch.equal(*found)
    assert spearmanr(*found)[0] >= 0.995


class Allowed(TorchDispatchMode):
    """The numbers of rows of products of two matrices, by whether these may be in tf32."""

    def __init__(self):
        super().__init__()
        self.rows = {False: set(), True: set()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in FACTORS:
            left = args[FACTORS[str(func)][0]]
            if left.dim() == 2 or "linear" in str(func):
                self.rows[torch.backends.cuda.matmul.allow_tf32].add(left.shape[:-1].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["tracin", "clip-score"])
def test_losses_and_products_of_one_row_per_pair_are_float32_where_others_are_tf32(estimator):
    model, checkpoint = make_model("tiny-vit", torch.float32)
    pairs, reference = pairs_of(model, 7, 0), pairs_of(model, 11, 100)
    batches, settings = Batches(reference, reference, reference), Settings(estimator=estimator, precision="tf32")
    plan = prepare(model, checkpoint, batches, settings, dataset_size=50, num_checkpoints=1)
    scorer = Scorer(model, [(checkpoint, plan)], reference, settings)
    with Allowed() as products:
        scorer.score(pairs)
    captions = 7 * longest_caption(pairs.tokens)
    assert products.rows[True] == {7 * 16, 7 * (1 + 16), captions}
    assert 7 in products.rows[False] <= {7, 11}


def test_what_runs_through_the_layers_is_not_rounded_to_bfloat16():
    model, checkpoint = make_model("tiny-vit", torch.float32)
    pairs, state = pairs_of(model, 3, 0), {**checkpoint.params, **checkpoint.buffers}
    passes, seen = Passes(model, Settings(precision="bf16")), []
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    handles = [block.register_forward_hook(lambda block, inputs, output: seen.append(output.dtype)) for block in blocks]
    try:
        for vectors in ({}, {"a": random_like(checkpoint.params, 1)}, dict.fromkeys(("a", "b"), checkpoint.params)):
            with torch.no_grad(), passes.ready():
                wanted = [("a", "b")] if len(vectors) == 2 else [tuple(vectors)]
                features = passes.jet(state, vectors, pairs, wanted)[()]
            for side in (features.image, features.text):
                torch.testing.assert_close(side.norm(dim=1), torch.ones(3))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [torch.float32] * 3 * len(blocks)


@pytest.mark.parametrize("rules", [TangentRules, TwiceDifferentiable])
def test_products_of_one_row_per_pair_are_float32(rules):
    rows, tokens, weight, patches = tensors((3, 4), (3, 5, 4), (4, 4), (4, 2, 3, 3))
    pixels = tensors((1, 2, 6, 6))[0].float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), rules():
        rows, tokens, weight, patches = (t.float() for t in (rows, tokens, weight, patches))
        assert (rows @ weight).dtype == torch.float32
        assert_same((rows @ weight).double(), rows.double() @ weight.double(), 1e-6)
        assert functional.linear(rows, weight).dtype == torch.float32
        assert functional.linear(rows.bfloat16(), weight).dtype == torch.float32
        assert functional.linear(tokens, weight).dtype == (tokens @ weight).dtype == torch.bfloat16
        assert functional.conv2d(pixels, patches, stride=3).dtype == torch.float32
        assert functional.conv2d(pixels, patches, None, (3, 3)).dtype == torch.float32
        assert functional.conv2d(pixels, patches, stride=1).dtype == torch.bfloat16
        assert functional.conv2d(pixels, patches, stride=3, padding=1).dtype == torch.bfloat16
        assert functional.conv2d(pixels, patches[:, :, :1, :1]).dtype == torch.bfloat16
