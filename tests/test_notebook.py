"""The notebook of the documentation runs from its first cell to the last, and shows what it says it shows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "demo.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    """Plots among the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check(notebook: nbformat.NotebookNode) -> None:
    """Hold the outputs against what the text around them says."""
    text = printed(notebook)
    assert "1,197 in, 838 kept" in text
    assert "keep 50% by similarity: 599 of 1197" in text
    assert "Train Epoch: 9" in text
    assert "zero-shot accuracy" in text
    assert "error" not in text.lower()
    assert pictures(notebook) == 4


def test_its_stored_outputs_are_whole() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check(notebook)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its shell lines find `diffprune` as they do in an activated environment.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(notebook)
