"""Attention with its tangent in one kernel: what it takes, when it is left alone, and its results in an interpreter.

On a GPU itself `test_gpu.py` checks it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from pipeline.influence import fused_attention
from pipeline.influence.arithmetic import arithmetic

INTERPRETED = """
import torch
from pipeline.influence import fused_attention

for heads, tokens, width, masked, dtype in [
    (3, 50, 64, False, torch.float32), (2, 77, 64, True, torch.float32), (2, 197, 32, False, torch.float32),
    (2, 13, 24, True, torch.float32), (1, 1, 8, False, torch.float32), (2, 77, 64, True, torch.float16),
]:
    torch.manual_seed(0)
    packed = torch.randn(2, 2, tokens, 3, heads, width).to(dtype)
    packed[1, :, :, 1] += 4  # moves all logits of a query alike, which the weights do not see
    parts = [part.transpose(1, 2) for dual in packed for part in dual.unbind(2)]
    mask = torch.full((80, 80), -torch.inf, dtype=dtype).triu(1)[:tokens, :tokens] if masked else None
    value, tangent = fused_attention._run(*parts, mask, width**-0.5)
    assert value.dtype == tangent.dtype == dtype and value.transpose(1, 2).is_contiguous()
    q, k, v, dq, dk, dv = (part.double() for part in parts)
    logits = width**-0.5 * q @ k.mT + (0 if mask is None else mask.double())
    _, moved = torch.func.jvp(
        lambda q, k, v: (width**-0.5 * q @ k.mT + (0 if mask is None else mask.double())).softmax(-1) @ v,
        (q, k, v), (dq, dk, dv),
    )
    for found, expected in ((value, logits.softmax(-1) @ v), (tangent, moved)):
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < (3e-6 if dtype == torch.float32 else 4e-3), (heads, tokens, width, error)
assert fused_attention._works(torch.device("cpu"), torch.float32, 24)
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
    """The kernel is there, and what is asked of it before it is used."""
    asked = Mock(return_value=True)
    monkeypatch.setattr(fused_attention, "_kernel", object())
    monkeypatch.setattr(fused_attention, "_works", asked)
    return asked


def test_it_takes_what_has_six_tensors_of_one_shape_in_16_bits(tried):
    six = [on_gpu(2, 4, 77, 64) for _ in range(6)]
    assert fused_attention.takes(six, None)
    assert fused_attention.takes(six, torch.zeros(80, 80)[:77, :77])
    tried.assert_called_with("gpu", torch.bfloat16, 64)
    assert not fused_attention.takes(six, torch.zeros(2, 77, 77))
    assert not fused_attention.takes(six, torch.zeros(77, 77).T)
    assert not fused_attention.takes([*six[:5], on_gpu(2, 4, 76, 64)], None)
    assert not fused_attention.takes([on_gpu(8, 77, 64)] * 6, None)
    assert not fused_attention.takes([on_gpu(2, 4, 77, 160)] * 6, None)


def test_it_takes_float32_where_tf32_is_allowed(tried):
    six, wider = ([on_gpu(2, 4, 77, 64, dtype=dtype)] * 6 for dtype in (torch.float32, torch.float64))
    with arithmetic("fp32"):
        assert not fused_attention.takes(six, None)
    with arithmetic("tf32"):
        assert fused_attention.takes(six, None)
        assert not fused_attention.takes(wider, None)


@pytest.mark.parametrize("kernel", ["fails", "lies"])
def test_a_kernel_that_does_not_work_here_is_left_alone(kernel, monkeypatch):
    def run(*given):
        if kernel == "fails":
            raise RuntimeError("Failed to find C compiler")
        return torch.zeros_like(given[0]), torch.zeros_like(given[0])

    monkeypatch.setattr(fused_attention, "_run", run)
    with pytest.warns(UserWarning, match="Failed to find C compiler" if kernel == "fails" else "off by 1"):
        assert not fused_attention._works.__wrapped__(torch.device("cpu"), torch.float32, 16)


def test_a_kernel_that_is_right_is_used(monkeypatch):
    monkeypatch.setattr(
        fused_attention, "_run", lambda *given: fused_attention._in_single_products(*given[:6], given[7])
    )
    assert fused_attention._works.__wrapped__(torch.device("cpu"), torch.float32, 16)
