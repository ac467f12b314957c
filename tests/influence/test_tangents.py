"""The hand-written tangent rules equal torch's own derivatives."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.influence import Settings
from pipeline.influence.forward_mode import push_named_forward
from pipeline.influence.passes import Passes
from pipeline.influence.tangents import TangentRules
from pipeline.influence.twice import TwiceDifferentiable
from tests.influence.test_models import FAMILIES, make_model, pairs_of


def random_like(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(v.shape, generator=generator, dtype=v.dtype) * 0.01 for n, v in tree.items()}


def assert_same(found, expected, relative=1e-11):
    assert (found - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wanted", [[("a",)], [("a",), ("b",)]], ids=["one", "stacked"])
def test_whole_models(name, wanted):
    model, checkpoint = make_model(name)
    pairs, state = pairs_of(model, 3, 0), {**checkpoint.params, **checkpoint.buffers}
    vectors = {"a": random_like(checkpoint.params, 1), "b": random_like(checkpoint.params, 2)}
    passes = Passes(model, Settings())
    with torch.no_grad(), passes.ready():
        jet = passes.jet(state, vectors, pairs, wanted)
        for (vector,) in wanted:
            value, tangent = jvp(
                lambda p: tuple(passes.features({**state, **p}, pairs)), (checkpoint.params,), (vectors[vector],)
            )
            for index in range(3):
                assert_same(jet[()][index], value[index])
                assert_same(jet[(vector,)][index], tangent[index], 1e-10)


def both_ways(function, points, tangents):
    """Value and tangent of a function of tensors, with and without the rules."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        plain = jvp(function, points, tangents)
        with TangentRules():
            ruled = jvp(function, points, tangents)
        with TangentRules(stacked=True):
            doubled = vmap(lambda *t: jvp(function, points, t), out_dims=(None, 0))(
                *(torch.stack([t, 2 * t]) for t in tangents)
            )
    assert_same(ruled[0], plain[0])
    assert_same(ruled[1], plain[1])
    assert_same(doubled[1], torch.stack([plain[1], 2 * plain[1]]))


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("operator", ["linear", "layer_norm", "batch_norm", "attention"])
def test_any_arguments_may_move(operator, moving):
    if operator == "linear":
        arguments, function = tensors((2, 5, 4), (3, 4), (3,)), functional.linear
    elif operator == "layer_norm":
        arguments, function = tensors((2, 5, 4), (4,), (4,)), lambda x, w, b: functional.layer_norm(x, (4,), w, b)
    elif operator == "batch_norm":
        arguments, (mean, spread) = tensors((2, 4, 3, 3), (4,), (4,)), tensors((4,), (4,), seed=2)
        function = lambda x, w, b: functional.batch_norm(x, mean, spread.square(), w, b)  # noqa: E731
    else:
        arguments, function = tensors((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 3)), functional.scaled_dot_product_attention

    def of_moving(*moved):
        filled = list(arguments)
        for place, value in zip(moving, moved, strict=True):
            filled[place] = value
        return function(*filled)

    points = tuple(arguments[place] for place in moving)
    both_ways(of_moving, points, tensors(*(point.shape for point in points), seed=1))


@pytest.mark.parametrize("form", ["none", "additive", "per pair", "boolean", "causal", "scale"])
def test_forms_of_attention(form):
    points = tensors((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    causal = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    options = {
        "none": {},
        "additive": {"attn_mask": causal},
        "per pair": {"attn_mask": torch.stack([causal, causal.T])[:, None]},
        "boolean": {"attn_mask": causal == 0},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
    }[form]
    both_ways(
        lambda *qkv: functional.scaled_dot_product_attention(*qkv, **options),
        points,
        tensors(*[(2, 2, 5, 4)] * 3, seed=1),
    )


@pytest.mark.parametrize("form", ["self", "masked", "other", "weights", "biased keys"])
def test_forms_of_multi_head_attention(form):
    module = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=form == "biased keys").double().eval()
    x, y = tensors((3, 5, 8), (3, 5, 8))
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1) if form == "masked" else None
    key = y if form == "other" else x
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        params = {n: p.detach() for n, p in module.named_parameters()}
        names = sorted(params)

        def run(x, *values):
            query, other = x, y if key is y else x
            call = (query, other, other)
            options = {"need_weights": form == "weights", "attn_mask": mask}
            return functional_call(module, dict(zip(names, values, strict=True)), call, options)[0]

        points = (x, *(params[n] for n in names))
        both_ways(run, points, tensors(*(p.shape for p in points), seed=1))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_is_near_float64(name):
    found = []
    for dtype in (torch.float32, torch.float64):
        model, checkpoint = make_model(name, dtype)
        pairs, state = pairs_of(model, 3, 0), {**checkpoint.params, **checkpoint.buffers}
        vectors = {
            "a": {
                n: v.to(dtype) for n, v in random_like({n: p.double() for n, p in checkpoint.params.items()}, 1).items()
            }
        }
        passes = Passes(model, Settings())
        with torch.no_grad(), passes.ready():
            jet = passes.jet(state, vectors, pairs, [("a",)])
            assert_same(passes.jet(state, vectors, pairs, [()])[()].image, jet[()].image, 1e-5)
            found.append(jet)
    for names in found[0]:
        for single, double in zip(found[0][names][:3], found[1][names][:3], strict=True):
            assert_same(single.double(), double, 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_passes_are_near_float32(name):
    model, checkpoint = make_model(name, torch.float32)
    pairs, state = pairs_of(model, 3, 0), {**checkpoint.params, **checkpoint.buffers}
    vectors = {"a": random_like(checkpoint.params, 1), "b": random_like(checkpoint.params, 2)}
    found = []
    for precision in ("fp32", "bf16"):
        passes = Passes(model, Settings(precision=precision))
        with torch.no_grad(), passes.ready():
            found.append([passes.jet(state, vectors, pairs, wanted) for wanted in ([("a",)], [("a",), ("b",)])])
    for full, lower in zip(*found, strict=True):
        for names, expected in full.items():
            for value, wide in zip(lower[names][:2], expected[:2], strict=True):
                assert value.dtype == torch.float32
                assert not torch.equal(value, wide)
                assert_same(value, wide, 0.1)


class Products(TorchDispatchMode):
    """Counts products of matrices by their dtype."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("mm.", "mm_.", "linear", "convolution")):
            self.counts[found.dtype] += 1
        return found


def test_bfloat16_passes_multiply_in_bfloat16():
    """All products but the logits of each attention block, and the projections of one row per pair."""
    model, checkpoint = make_model("tiny-vit", torch.float32)
    pairs, state = pairs_of(model, 3, 0), {**checkpoint.params, **checkpoint.buffers}
    passes = Passes(model, Settings(precision="bf16"))
    with torch.no_grad(), passes.ready(), Products() as products:
        passes.jet(state, {"a": random_like(checkpoint.params, 1)}, pairs, [("a",)])
    blocks = len(model.visual.transformer.resblocks) + len(model.transformer.resblocks)
    # A projection's value and its tangent of two parts.
    assert products.counts[torch.float32] == blocks + 2 * 3
    # Of a block's four linear layers the value and two parts of the tangent, which are one product after a norm, whose
    # values are cast anyway; of attention one value and four parts.
    assert products.counts[torch.bfloat16] >= blocks * (2 * 2 + 2 * 3 + 5)


@pytest.mark.parametrize("form", ["scaled_dot_product", "multi_head"])
def test_logits_are_not_rounded_to_bfloat16(form):
    """Neighbouring bfloat16 numbers near 40 are a quarter apart: rounded logits would bend weights by a tenth."""
    x = 4 * tensors((1, 6, 16), seed=3)[0]
    weight, bias = torch.cat([torch.eye(16)] * 3), torch.zeros(48)

    def attend(x):
        if form == "scaled_dot_product":
            return functional.scaled_dot_product_attention(x[None], x[None], x[None])
        eye, zero = weight[:16].to(x.dtype), bias[:16].to(x.dtype)
        call = (x.transpose(0, 1),) * 3 + (
            16,
            1,
            weight.to(x.dtype),
            bias.to(x.dtype),
            None,
            None,
            False,
            0.0,
            eye,
            zero,
        )
        return functional.multi_head_attention_forward(*call, training=False, need_weights=False)[0].transpose(0, 1)

    rounded, moved = x.bfloat16(), torch.ones_like(x)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), TangentRules():
        expected, slope = jvp(attend, (rounded.double(),), (moved,))
        with torch.autocast("cpu", torch.bfloat16):
            found, bent = jvp(attend, (rounded.float(),), (moved.float(),))
    assert_same(found.double(), expected, 0.01)
    assert_same(bent.double(), slope, 0.02)


def test_one_tangent_takes_no_layers_that_nest():
    """The lighter way to one derivative gives the same numbers to the last bit; what does not move has a zero."""
    x, w, still = tensors((4, 5), (3, 5), (2,))
    tangents = dict(zip("xw", tensors((4, 5), (3, 5), seed=1), strict=True))

    def function(named):
        return functional.linear(named["x"], named["w"]).tanh(), still

    value, tangent = push_named_forward(function, {"x": x, "w": w}, tangents)
    expected = jvp(lambda x, w: functional.linear(x, w).tanh(), (x, w), (tangents["x"], tangents["w"]))
    assert torch.equal(value[0], expected[0])
    assert torch.equal(tangent[0], expected[1])
    assert torch.equal(tangent[1], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("rules", [TangentRules, TwiceDifferentiable])
@pytest.mark.parametrize("lower", [False, True])
def test_patches_by_one_product_are_those_of_the_convolution(rules, lower):
    """What is left at the edges is left out, and the tokens of a lowered product are float32."""
    dtype = torch.float32 if lower else torch.float64
    generator = torch.Generator().manual_seed(0)
    images, weight, moved = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((2, 3, 33, 19), (5, 3, 8, 4), (5, 3, 8, 4))
    )
    bias, shifted = torch.randn(2, 5, generator=generator, dtype=dtype)

    def run(weight, bias):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            return functional.conv2d(images, weight, bias, stride=(8, 4))

    with torch.no_grad():
        expected = jvp(run, (weight, bias), (moved, shifted))
        with rules():
            found = jvp(run, (weight, bias), (moved, shifted))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (2, 5, 4, 4)
        assert one.dtype == dtype
        assert_same(one.double(), other.double(), 2e-2 if lower else 1e-12)


def test_other_convolutions_stay_convolutions():
    images, weight = torch.randn(2, 4, 12, 12), torch.randn(6, 4, 3, 3)
    with torch.no_grad():
        for options in ({"stride": 2}, {"stride": 3, "padding": 1}, {"stride": 3, "dilation": 2}, {"stride": 1}):
            expected = functional.conv2d(images, weight, **options)
            with TangentRules():
                assert torch.equal(functional.conv2d(images, weight, **options), expected)
        with TangentRules():
            grouped = functional.conv2d(images, weight[:, :2], stride=3, groups=2)
        assert torch.equal(grouped, functional.conv2d(images, weight[:, :2], stride=3, groups=2))
