"""The notebook of the documentation runs from its first cell to the last, and shows what it says it shows.

`python -m tests.test_notebook` runs it and stores what it shows.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "demo.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


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


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook with what it shows when it runs in `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":  # shell lines have a terminal of their own
                output.text = output.text.replace("\r\n", "\n")
    return notebook


def find_diffprune() -> str:
    """A `PATH` by which shell lines find `diffprune` as they do in an activated environment."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def test_its_stored_outputs_are_whole() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check(notebook)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"(?<![.\w])/(home|root|tmp|Users|work|var)/", text), "a path of the machine it ran on"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", find_diffprune())
    check(executed(tmp_path))


if __name__ == "__main__":
    os.environ["PATH"] = find_diffprune()
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    check(notebook)
    nbformat.write(notebook, NOTEBOOK)
