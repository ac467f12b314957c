"""Compiled passes give what the others give, for any number of pairs and length of captions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch._inductor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import InputError
from pipeline.influence import Batches, Scorer, Settings, dense, prepare, prepare_run
from pipeline.influence import arithmetic as arithmetics
from pipeline.influence.arithmetic import _product, arithmetic
from pipeline.influence.compiled import Programs
from pipeline.influence.plan import Probe, ProbePlan
from pipeline.types import Checkpoint, Features, PairBatch
from tests.benchmarks.precision import FACTORS
from tests.influence.test_diff_in import N, assert_close, make_case
from tests.influence.test_models import FAMILIES, make_model, pairs_of
from tests.influence.test_twice import ScaledStdConv2d, Standardised
from tests.influence.towers import SmallTowers, make_pairs, state_of, trained

SELF = Settings(estimator="diff-in-self", projections=2, eigenpairs=1)

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling on a CPU needs g++")


@pytest.fixture
def traced(monkeypatch):
    """Programs as they are traced, without the seconds that compiling them takes; the shapes of each are kept."""
    shapes = []

    def as_traced(graph, inputs, options):
        shapes.append((len(inputs[2]), inputs[3].shape[1]))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", as_traced)
    return shapes


def both(model, checkpoint, reference, settings, plan=None, **kwargs):
    """A scorer of plain passes and one of compiled ones."""
    if plan is None:
        batches = Batches(reference, reference, reference)
        plan = prepare(model, checkpoint, batches, settings, dataset_size=50, num_checkpoints=1)
    return [Scorer(model, [(checkpoint, plan)], reference, settings, compiled=on, **kwargs) for on in (False, True)]


def assert_same_scores(plain, programs, pairs, relative):
    expected, found = plain.score(pairs), programs.score(pairs)
    assert_close(found.terms, expected.terms, relative)
    assert_close(found.loss, expected.loss, relative)
    assert_close(found.embedding.float(), expected.embedding.float(), max(relative, 2e-3))


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in FAMILIES), ("tiny-vit", "bf16"), ("tiny-resnet", "bf16")]
)
def test_every_family_can_be_traced(name, precision, traced):
    model, checkpoint = make_model(name, torch.float32)
    settings = Settings(estimator="tracin", family=FAMILIES[name], precision=precision)
    plain, programs = both(model, checkpoint, pairs_of(model, 6, 0), settings, batch_size=4)
    before = model.cuts_captions
    # Repeated operations in the same order: rounding is the same but where a part has other sizes.
    assert_same_scores(plain, programs, pairs_of(model, 7, 100), 1e-4 if precision == "fp32" else 5e-2)
    assert {size for size, _ in traced} == {4}
    assert model.cuts_captions == before


@pytest.mark.parametrize("parameters", ["all", "projections"])
@pytest.mark.parametrize("estimator", ["tracin", "diff-in", "diff-in-self", "tracin-self", "grand", "unrolled"])
@pytest.mark.parametrize("method", ["exact", "central"])
def test_every_kind_of_pass_can_be_traced(estimator, method, parameters, traced):
    settings = Settings(estimator=estimator, method=method, parameters=parameters, projections=4, eigenpairs=2)
    model, checkpoints, batches, pairs = make_case(settings)
    plans = prepare_run(model, checkpoints, batches, settings, dataset_size=N)
    parts = list(zip(checkpoints, plans, strict=True))
    plain, programs = (
        Scorer(model, parts, batches.reference, settings, batch_size=4, compiled=on) for on in (False, True)
    )
    assert traced  # at the start already
    assert_same_scores(plain, programs, pairs, 1e-7)


@pytest.mark.parametrize("method", ["exact", "central"])
def test_passes_through_standardised_convolutions_can_be_traced(method, traced):
    model, pool, settings = Standardised(ScaledStdConv2d), make_pairs(20, seed=1, size=4), Settings(method=method)
    (checkpoint,) = trained(model, pool, settings, steps=(3,))
    plain, programs = both(model, checkpoint, pool[:4], settings, batch_size=4)
    assert traced
    assert_same_scores(plain, programs, pool[4:11], 1e-7)


def test_a_program_serves_all_captions_of_up_to_its_tokens(traced):
    model, checkpoint = make_model("tiny-vit", torch.float32)
    assert model.cuts_captions
    settings = Settings(estimator="tracin")
    plain, programs = both(model, checkpoint, pairs_of(model, 4, 0), settings, batch_size=4)
    pairs = pairs_of(model, 13, 100)
    assert_same_scores(plain, programs, pairs, 1e-4)
    assert_same_scores(plain, programs, pairs, 1e-4)
    assert sorted(traced) == [(4, 8), (4, 16)]


def of_full_length(pairs):
    """The pairs, one of them with as many tokens as there may be."""
    pairs.tokens[1, :-1] = 300
    pairs.tokens[1, -1] = 49407
    return pairs


def test_captions_of_full_length_are_not_cut(traced):
    model, checkpoint = make_model("tiny-vit", torch.float32)
    pairs = of_full_length(pairs_of(model, 4, 0))
    plain, programs = both(model, checkpoint, pairs, Settings(estimator="tracin"), batch_size=4)
    assert_same_scores(plain, programs, pairs, 1e-4)
    assert traced == [(4, model.context_length)]


def test_few_pairs_are_run_without_a_program(traced):
    model, checkpoints, batches, _ = make_case(Settings(estimator="tracin"), torch.float32)
    plain, programs = both(model, checkpoints[0], batches.reference, Settings(estimator="tracin"), batch_size=8)
    assert traced == [(8, 4)]  # R, whatever its size: what cannot be compiled shows at the start
    calls = []
    ready = programs.passes.programs
    run = ready.run
    ready.run = lambda *args: calls.append(len(args[-1])) or run(*args)
    pairs = make_pairs(20, seed=9, first_id=700)
    assert_same_scores(plain, programs, pairs, 1e-5)
    assert calls == [8, 8]
    programs.score(pairs[:13])
    assert calls == [8, 8, 8, 5]


def test_pairs_that_do_not_fit_into_memory_are_compiled_in_halves(traced, monkeypatch):
    model, checkpoints, batches, _ = make_case(Settings(estimator="tracin"), torch.float32)
    plain, programs = both(model, checkpoints[0], batches.reference[:2], Settings(estimator="tracin"), batch_size=8)
    ready = programs.passes.programs
    run = ready.run

    def cramped(*args):
        if ready.size > 4:
            raise torch.OutOfMemoryError("of 8 pairs")
        return run(*args)

    ready.run = cramped
    assert_same_scores(plain, programs, make_pairs(9, seed=9, first_id=700), 1e-5)
    assert ready.size == programs.batch_size == 4
    assert traced[-1] == (4, 4)


class Precisions(TorchDispatchMode):
    """Products of matrices by shape and dtype, and whether these may be in tf32."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.diffprune.product.default:
            with self:  # what is computed within
                return _product(*args, **(kwargs or {}))
        factors = FACTORS | {"aten.matmul.default": (0, 1)}
        if str(func) in factors:
            left = args[factors[str(func)][0]]
            self.seen.add((tuple(left.shape), left.dtype, torch.backends.cuda.matmul.allow_tf32))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [Settings(method="exact"), SELF], ids=lambda settings: settings.estimator)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_products_of_a_program_are_in_the_precision_of_plain_passes(precision, settings, traced, monkeypatch):
    """In tf32 those of one row per pair are float32; in bfloat16 attention's first one is tf32."""
    monkeypatch.setattr(dense, "_by_onednn", lambda *_: False)  # as on a GPU
    model, checkpoint = make_model("tiny-vit", torch.float32)
    settings = replace(settings, precision=precision)
    reference, pairs = (of_full_length(pairs_of(model, 4, first)) for first in (0, 100))
    found = []
    for scorer in both(model, checkpoint, reference, settings, batch_size=4):
        with Precisions() as products:
            scorer.score(pairs)
        found.append(products.seen)
    assert traced
    assert found[1] == found[0]
    assert {tf32 for shape, _, tf32 in found[1] if shape == (4, model.visual.proj.shape[0])} == {False}
    assert {tf32 for *_, tf32 in found[1]} == {False, True}


@needs_a_compiler
def test_compiled_products_carry_their_precision():
    """Also where they add to a tensor in place."""

    def work(state, along, images, tokens):
        with arithmetic("fp32"):
            total = images @ state["w"]
            total.addmm_(images, state["v"], alpha=2)
            batches = torch.baddbmm(total[None], images[None], state["w"][None], beta=0.5)[0]
        return [Features(total, batches, tokens.sum(), tokens.sum())]

    images, tokens = torch.randn(4, 5), torch.arange(8).view(4, 2)
    state = {name: torch.randn(5, 5) for name in ("w", "v")}
    pairs = PairBatch(images, tokens, torch.arange(4), torch.arange(4))
    with arithmetic("tf32"), mock.patch.object(arithmetics, "arithmetic", wraps=arithmetic) as asked:
        found = Programs(SmallTowers(), 4).run(work, state, {}, pairs)[0]
    assert [call.args for call in asked.call_args_list[-3:]] == [("fp32",)] * 3
    (expected,) = work(state, {}, images, tokens)
    torch.testing.assert_close(found.image, expected.image)
    torch.testing.assert_close(found.text, expected.text)


class Looking(SmallTowers):
    """Its way depends on what the pairs are."""

    def forward(self, images, tokens):
        found = super().forward(images, tokens)
        return found if int(tokens.sum()) > 0 else Features(found.text, found.image, found.scale, found.bias)


def test_a_model_that_looks_at_the_pairs_is_refused_at_the_start():
    model = Looking(dtype=torch.float32)
    reference = make_pairs(6, seed=1)
    checkpoint = Checkpoint(1, 0.1, 0, state_of(model), {})
    with pytest.raises(InputError, match=r"passes could not be compiled: .* use score.compile: false"):
        both(model, checkpoint, reference, Settings(estimator="tracin"))


@needs_a_compiler
@pytest.mark.parametrize("method", ["exact", "central"])
def test_compiled_programs_give_the_scores_of_plain_passes(method):
    settings = Settings(method=method)
    model, checkpoints, batches, pairs = make_case(settings, torch.float64)
    plans = [prepare(model, c, batches, settings, dataset_size=N, num_checkpoints=1) for c in checkpoints[:2]]
    parts = list(zip(checkpoints, plans, strict=False))
    plain, programs = (
        Scorer(model, parts, batches.reference, settings, batch_size=4, compiled=on) for on in (False, True)
    )
    assert_same_scores(plain, programs, pairs, 1e-7)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-siglip"])
def test_compiled_models_give_the_scores_of_plain_passes(name, precision):
    model, checkpoint = make_model(name, torch.float32)
    settings = Settings(estimator="tracin", family=FAMILIES[name], precision=precision)
    plain, programs = both(model, checkpoint, pairs_of(model, 6, 0), settings, batch_size=16)
    pairs = pairs_of(model, 30, 100)
    assert_same_scores(plain, programs, pairs, 1e-4 if precision == "fp32" else 5e-2)


def test_a_plan_without_tangents_compiles_nothing(traced):
    model = SmallTowers(dtype=torch.float32)
    reference = make_pairs(6, seed=1)
    checkpoint = Checkpoint(1, 0.1, 0, state_of(model), {})
    plain, programs = both(
        model, checkpoint, reference, Settings(estimator="clip-score"), ProbePlan([Probe(1.0, of="similarity")])
    )
    assert_same_scores(plain, programs, make_pairs(9, seed=3, first_id=100), 1e-6)
    assert traced == []
