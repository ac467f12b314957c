"""Operators with their tangents in one kernel: what they take, when they are left alone, and results in an interpreter.

On a GPU itself `test_gpu.py` checks them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from pipeline.influence import fused
from pipeline.influence.arithmetic import arithmetic
from tests.influence.test_scorer import LACKS

INTERPRETED = """
import torch
from torch.func import jvp
from torch.nn import functional
from pipeline.influence import fused


def check(found, expected, dtype, what):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        error = float((one.double() - other).abs().max() / other.abs().max())
        assert error < (3e-6 if dtype == torch.float32 else 4e-3), (what, error)


for heads, tokens, width, masked, dtype in [
    (3, 50, 64, False, torch.float32), (2, 77, 64, True, torch.float32), (2, 197, 32, False, torch.float32),
    (2, 13, 24, True, torch.float32), (1, 1, 8, False, torch.float32), (2, 77, 64, True, torch.float16),
]:
    torch.manual_seed(0)
    packed = torch.randn(2, 2, tokens, 3, heads, width).to(dtype)
    packed[1, :, :, 1] += 4  # moves all logits of a query alike, which the weights do not see
    parts = [part.transpose(1, 2) for dual in packed for part in dual.unbind(2)]
    mask = torch.full((80, 80), -torch.inf, dtype=dtype).triu(1)[:tokens, :tokens] if masked else None
    found = fused.attention_with_tangent(parts, mask, width**-0.5)
    assert found[0].transpose(1, 2).is_contiguous()
    doubled = [part.double() for part in parts]
    expected = jvp(
        lambda q, k, v: (width**-0.5 * q @ k.mT + (0 if mask is None else mask.double())).softmax(-1) @ v,
        tuple(doubled[:3]), tuple(doubled[3:]),
    )
    check(found, expected, dtype, ("attention", heads, tokens, width))
for width in (24, 512, 768, 1000):
    (x, dx), parameters = 3 + torch.randn(2, 2, 5, width), torch.randn(4, width)
    found = fused.norm_with_tangent([x.transpose(0, 1), dx.transpose(0, 1)], list(parameters), 1e-3)
    expected = jvp(
        lambda x, w, b: functional.layer_norm(x, (width,), w, b, 1e-3),
        (x.transpose(0, 1).double(), *parameters[:2].double()), (dx.transpose(0, 1).double(), *parameters[2:].double()),
    )
    check(found, expected, torch.float32, ("norm", width))
for size, dtype in ((7, torch.float32), (5000, torch.float32), (3000, torch.float16)):
    x, dx = (3 * torch.randn(2, 3, size)).to(dtype)
    check(fused.gelu_with_tangent([x, dx]), jvp(functional.gelu, (x.double(),), (dx.double(),)), dtype, ("gelu", size))
for function in fused._EXAMPLES:
    assert fused._works(function, torch.device("cpu"), torch.float32, 24)
    assert fused._works(function, torch.device("cpu"), torch.float16, 64)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: torch's CUDA builds bring it")
def test_its_results_in_an_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment)


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Mock:
    """What `takes` sees of a tensor on a GPU."""
    plain = torch.empty(shape, dtype=dtype)
    return Mock(is_cuda=True, shape=plain.shape, dtype=dtype, itemsize=plain.itemsize, dim=plain.dim, device="gpu")


@pytest.fixture
def tried(monkeypatch):
    """The kernels are there, and what is asked of them before they are used."""
    asked = Mock(return_value=True)
    monkeypatch.setattr(fused, "kernels", object())
    monkeypatch.setattr(fused, "_works", asked)
    return asked


def test_attention_of_six_tensors_of_one_shape_in_16_bits(tried):
    six = [on_gpu(2, 4, 77, 64) for _ in range(6)]
    assert fused.takes_attention(six, None)
    assert fused.takes_attention(six, torch.zeros(80, 80)[:77, :77])
    tried.assert_called_with(fused.attention_with_tangent, "gpu", torch.bfloat16, 64)
    assert not fused.takes_attention(six, torch.zeros(2, 77, 77))
    assert not fused.takes_attention(six, torch.zeros(77, 77).T)
    assert not fused.takes_attention([*six[:5], on_gpu(2, 4, 76, 64)], None)
    assert not fused.takes_attention([on_gpu(8, 77, 64)] * 6, None)
    assert not fused.takes_attention([on_gpu(2, 4, 77, 160)] * 6, None)


def test_attention_in_float32_where_tf32_is_allowed(tried):
    six, wider = ([on_gpu(2, 4, 77, 64, dtype=dtype)] * 6 for dtype in (torch.float32, torch.float64))
    with arithmetic("fp32"):
        assert not fused.takes_attention(six, None)
    with arithmetic("tf32"):
        assert fused.takes_attention(six, None)
        assert not fused.takes_attention(wider, None)


def test_norms_in_float32_over_their_last_dimension(tried):
    x, parameters = ([on_gpu(*shape, dtype=torch.float32)] * n for shape, n in (((2, 77, 512), 2), ((512,), 4)))
    assert fused.takes_norm(x, parameters)
    tried.assert_called_with(fused.norm_with_tangent, "gpu", torch.float32, 512)
    assert not fused.takes_norm(x, [on_gpu(77, 512, dtype=torch.float32)] * 4)
    assert not fused.takes_norm(x, [on_gpu(512)] * 4)
    assert not fused.takes_norm([on_gpu(2, 77, 512)] * 2, [on_gpu(512)] * 4)
    wide = [on_gpu(16384, dtype=torch.float32)] * 6
    assert not fused.takes_norm(wide[:2], wide[2:])


def test_gelu_of_float32_and_shorter(tried):
    assert fused.takes_gelu([on_gpu(2, 77, 512)] * 2)
    assert fused.takes_gelu([on_gpu(2, 77, 512, dtype=torch.float32)] * 2)
    assert not fused.takes_gelu([on_gpu(2, 77, 512, dtype=torch.float64)] * 2)


def test_compiled_passes_have_norms_and_gelu_of_their_own(tried, monkeypatch):
    monkeypatch.setattr(fused, "traced", lambda: True)
    x, parameters = ([on_gpu(*shape, dtype=torch.float32)] * n for shape, n in (((2, 77, 512), 2), ((512,), 4)))
    assert not fused.takes_norm(x, parameters)
    assert not fused.takes_gelu(x)
    assert fused.takes_attention([on_gpu(2, 4, 77, 64)] * 6, None)


def test_tensors_of_a_cpu_are_not_taken(monkeypatch):
    monkeypatch.setattr(fused, "kernels", object())
    assert not fused.takes_gelu([torch.randn(4)] * 2)
    assert not fused.takes_norm([torch.randn(4, 8)] * 2, [torch.randn(8)] * 4)
    assert not fused.takes_attention([torch.randn(1, 2, 3, 4).bfloat16()] * 6, None)


NAMES = ["attention", "norm", "gelu"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["fails", "lies"])
def test_a_kernel_that_does_not_work_here_is_left_alone(name, kernel, monkeypatch):
    function = getattr(fused, f"{name}_with_tangent")

    def run(*given):
        if kernel == "fails":
            raise RuntimeError("Failed to find C compiler")
        first = given[0][0]
        return torch.zeros_like(first), torch.zeros_like(first)

    monkeypatch.setattr(fused, function.__name__, run)
    with pytest.warns(UserWarning, match=f"{name} .*{'find C compiler' if kernel == 'fails' else 'off by 1'}"):
        assert not fused._works.__wrapped__(function, torch.device("cpu"), torch.float32, 16)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("2 GiB"), *LACKS],
    ids=lambda error: str(error)[:40],
)
def test_a_lack_of_memory_says_nothing_about_a_kernel(error, monkeypatch):
    """Passes are halved then, and it is tried again."""
    monkeypatch.setitem(fused._EXAMPLES, fused.gelu_with_tangent, Mock(side_effect=error))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fused._works(fused.gelu_with_tangent, torch.device("cpu"), torch.float32, 31)
    monkeypatch.undo()
    monkeypatch.setattr(fused, "gelu_with_tangent", by_torch_gelu)
    monkeypatch.setitem(fused._EXAMPLES, by_torch_gelu, fused._gelu_example)
    assert fused._works(by_torch_gelu, torch.device("cpu"), torch.float32, 31)


def test_attention_is_left_to_torch_where_tensor_cores_do_not_know_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match=r"attention .*expected compute capability 8\.0 or more, found 7\.5"):
        assert not fused._works(fused.attention_with_tangent, torch.device("cuda"), torch.bfloat16, 64)


def by_torch_attention(tensors, mask, scale):
    masked = 0 if mask is None else mask
    return torch.func.jvp(
        lambda q, k, v: (scale * q @ k.mT + masked).softmax(-1) @ v, tuple(tensors[:3]), tuple(tensors[3:])
    )


def by_torch_norm(x, parameters, eps):
    return torch.func.jvp(
        lambda x, w, b: torch.nn.functional.layer_norm(x, w.shape, w, b, eps),
        (x[0], *parameters[:2]),
        (x[1], *parameters[2:]),
    )


def by_torch_gelu(x):
    return torch.func.jvp(torch.nn.functional.gelu, (x[0],), (x[1],))


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_is_right_is_used(name, monkeypatch):
    function = getattr(fused, f"{name}_with_tangent")
    monkeypatch.setattr(fused, function.__name__, globals()[f"by_torch_{name}"])
    assert fused._works.__wrapped__(function, torch.device("cpu"), torch.float32, 16)
