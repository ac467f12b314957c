"""Score files are read in several parts in every test here: those of tests have too few rows for that by themselves."""

from __future__ import annotations

import pytest

from pipeline.selection.scan import ScoreFile


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScoreFile.spans, "__defaults__", (14,))
