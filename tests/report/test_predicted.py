"""The section on predicted scores: there with a sample and its mark, and not without."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import ScoreConfig
from pipeline.report import write_report
from pipeline.report.predicted import predicted_section
from pipeline.run import RunFolder
from pipeline.store import storage
from tests.report.synthetic import make_run

CURVE = [
    {"share": 0.01, "pairs": 100, "correlation": 0.21, "low": 0.1, "high": 0.32},
    {"share": 0.04, "pairs": 400, "correlation": 0.412, "low": 0.33, "high": 0.49},
]


def write_mark(run: RunFolder) -> None:
    storage.write_json(run.regressor_mark, {"kind": "ridge", "pairs": 500, "error": 1.0, "curve": CURVE})


def test_it_says_what_was_predicted_by_what_and_how_well(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert predicted_section(run) is None
    write_mark(run)
    section = predicted_section(run)
    assert section is not None
    assert "The scores of 500 pairs were computed and a regression (ridge)" in section.about
    assert "0.412 at 4.0" in section.figure.see.replace("\u202f", "").replace("\u00a0", "")
    for words in ("1.0", "0.210 from 100 pairs", "0.412 from 400 pairs"):
        assert words in section.figure.wide


def test_the_page_has_it_only_for_a_run_with_a_sample(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=30, extras=False)
    write_mark(made.run)
    page = Path(write_report(made.run, made.config)).read_text(encoding="utf-8")
    assert 'id="predicted"' not in page
    config = made.config.model_copy(update={"score": ScoreConfig(sample=0.05)})
    page = Path(write_report(made.run, config)).read_text(encoding="utf-8")
    assert 'id="predicted"' in page
    assert 'href="#predicted"' in page
