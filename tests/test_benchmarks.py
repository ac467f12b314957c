"""Every benchmark starts: what it imports is there, and it says how it is called."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import pytest

from tests.benchmarks.__main__ import benchmarks


def test_the_one_for_gpus_measures_without_ray(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    options = "--device cpu --models tiny-vit --batch 4 8 --precisions fp32 --pairs 8 --seconds 0"
    monkeypatch.setattr(sys, "argv", ["gpu", *options.split()])
    for name in ("ray", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_module("tests.benchmarks.gpu", run_name="__main__")
    head, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[:2] + row[3:4] for row in rows] == [["| tiny-vit", "fp32", size] for size in ("4", "8")]
    for row in rows:
        assert len(row) == len(head)
        assert all(float(row[place]) > 0 for place in (2, 4, 5, 8))


@pytest.mark.parametrize("name", benchmarks())
def test_it_prints_its_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"tests.benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"tests.benchmarks.{name}", run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
