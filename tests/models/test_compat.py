"""torchvision and open_clip import in a fresh process, whatever torch they meet."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

# A torch whose torchvision cannot load its C++ operators: what a CPU torch with a CUDA torchvision looks like.
BROKEN = """
import torch
def load_library(path):
    raise OSError("made for another torch")
torch.ops.load_library = load_library
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_open_clip_imports_after_it() -> None:
    run("import pipeline.models.compat; import open_clip, timm")


def test_it_declares_the_operators_where_the_extension_does_not_load() -> None:
    code = BROKEN + "from pipeline.models import compat; print(compat.declared_operators is not None); import open_clip"
    assert run(code) == "True"


def test_it_leaves_a_working_torchvision_alone() -> None:
    code = """
import sys, types
sys.modules["torchvision"] = types.ModuleType("torchvision")
from pipeline.models import compat
print(compat.declared_operators)
"""
    assert run(code) == "None"


def test_other_failures_of_torchvision_are_not_hidden() -> None:
    code = """
import importlib
real = importlib.import_module
def broken(name, package=None):
    if name == "torchvision":
        raise RuntimeError("something else")
    return real(name, package)
importlib.import_module = broken
try:
    import pipeline.models.compat
except RuntimeError as error:
    print(error)
"""
    assert run(code) == "something else"


@pytest.mark.ray
def test_it_works_in_a_ray_worker(ray_local: None) -> None:
    import ray

    @ray.remote
    def forward() -> tuple[int, ...]:
        from pipeline.models.clip import build_model

        model = build_model("tiny-vit")
        tokens = model.tokenize(["a cat"])
        return tuple(model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), tokens).image.shape)

    assert ray.get(forward.remote()) == (1, 32)
