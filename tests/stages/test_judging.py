"""How a selection is judged by a truth: what is noted, what is shown, and when it is judged again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import parse_config
from pipeline.data.inventory import ShardInfo, write_inventory
from pipeline.errors import InputError
from pipeline.report.tables import quality_table
from pipeline.run import RunFolder
from pipeline.stages import judging, looking
from pipeline.stages.evaluation_sets import training_sets
from pipeline.stages.job import Job
from pipeline.stages.summary import note_selection, quality_lines, show, speak_of_selection
from pipeline.store import storage
from tests.selection.scores import row, select, uid, write_run

PAIRS = 10


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Ten scored pairs, the higher the number the higher the utility, of which the selection keeps the upper half."""
    run = write_run(tmp_path / "run", [[row(number, float(number)) for number in range(PAIRS)]])
    write_inventory(run.inventory, [ShardInfo(0, "/in/0.tar", "0.tar", PAIRS, 1, "v")])
    select(run, job_of(run).config.select, seed=0)
    return run


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The configs that were judged, in this process."""
    calls: list[object] = []

    def run_task(function: Any, item: object, **_: object) -> object:
        calls.append(item)
        return function(item)

    monkeypatch.setattr(judging, "run_task", run_task)
    return calls


def job_of(run: RunFolder, truth: str | None = None, **evaluate: object) -> Job:
    tree: dict[str, Any] = {"out": run.root, "data": {"shards": "/in/*.tar"}, "select": {"keep": 0.5}}
    return Job(parse_config(tree | {"evaluate": {"truth": truth, **evaluate}}))


def write_truth(tmp_path: Path, wrong: set[int], first: int = 0) -> str:
    """A truth about ten pairs from number `first` on."""
    path = tmp_path / "truth.csv"
    lines = [f"{uid(number)},cat,{'dog' if number in wrong else 'cat'}" for number in range(first, first + PAIRS)]
    path.write_text("\n".join(["uid,clean,caption_class", *lines]))
    return str(path)


def quality(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = storage.read_json(run.summary)["quality"]
    return found


def test_what_cannot_be_said_of_a_truth_is_a_dash(run: RunFolder, tmp_path: Path, judged: list[object]) -> None:
    job = job_of(run, write_truth(tmp_path, wrong=set()))
    note_selection(job)
    assert quality(run)["by"]["utility"]["auroc"] is None
    assert quality(run)["precision"] == 0
    storage.write_json(run.summary, {**storage.read_json(run.summary), "seconds": {}})
    show(job, [], Console(file=(file := io.StringIO()), width=200))
    assert "AUROC \u2013, average precision \u2013, precision \u2013 at the true number" in file.getvalue()
    table = quality_table(quality(run))
    assert table is not None
    assert [" ".join(cell.split()) for cell in table.rows[0]] == ["utility", "\u2013", "\u2013", "\u2013", "0.0 %"]


def test_a_ranking_without_a_value_is_a_dash(run: RunFolder, tmp_path: Path, judged: list[object]) -> None:
    job = job_of(run, write_truth(tmp_path, wrong={0, 1}), compare={"spread": {"by": "utility_std"}})
    note_selection(job)
    assert quality(run)["by"]["utility"]["auroc"] == 1
    assert quality(run)["by"]["spread"]["base_rate"] is None
    table = quality_table(quality(run))
    assert table is not None
    assert [row[1:] for row in table.rows if row[0] == "spread"] == [("\u2013",) * 4]


def test_a_truth_about_other_pairs_is_refused(run: RunFolder, tmp_path: Path, judged: list[object]) -> None:
    truth = write_truth(tmp_path, wrong={100}, first=100)
    message = r"truth\.csv: expected the uids of this run's pairs, none of its 10 is among the run's 10"
    with pytest.raises(InputError, match=message):
        note_selection(job_of(run, truth))
    with pytest.raises(InputError, match=message):
        list(training_sets(job_of(run, truth, baselines=["right-only"])))


def test_a_selection_is_judged_again_by_another_truth_or_other_rankings(
    run: RunFolder, tmp_path: Path, judged: list[object]
) -> None:
    note_selection(job_of(run))
    assert "quality" not in storage.read_json(run.summary)
    job = job_of(run, write_truth(tmp_path, wrong={0, 1}))
    for _ in range(2):
        speak_of_selection(job)
        assert quality(run)["precision"] == 2 / 5
    assert len(judged) == 1
    write_truth(tmp_path, wrong={0})
    speak_of_selection(job)
    assert quality(run)["precision"] == 1 / 5
    speak_of_selection(job_of(run, job.config.evaluate.truth, compare={"loss": {"by": "loss"}}))  # type: ignore[union-attr]
    assert set(quality(run)["by"]) == {"utility", "similarity", "select", "loss"}
    Path(str(job.config.evaluate.truth)).write_text("uid,clean\na,b\n")  # type: ignore[union-attr]
    with pytest.raises(InputError, match="; missing: caption_class"):
        speak_of_selection(job)
    speak_of_selection(job_of(run))
    assert "quality" not in storage.read_json(run.summary)


def test_a_selection_made_again_is_judged_again(run: RunFolder, tmp_path: Path, judged: list[object]) -> None:
    job = job_of(run, write_truth(tmp_path, wrong={0, 1}))
    note_selection(job)
    select(run, job.config.select.model_copy(update={"keep": 0.8}), seed=0)
    speak_of_selection(job)
    assert quality(run)["precision"] == 1


def test_a_selection_and_a_dry_run_say_how_well_wrong_captions_are_found(
    run: RunFolder, tmp_path: Path, judged: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality_lines(job_of(run)) == []
    job = job_of(run, write_truth(tmp_path, wrong={0, 2}))
    note_selection(job)
    lines = quality_lines(job)
    assert lines[0] == "wrong captions: 40.0\u202f% of the pruned are wrong, 20.0\u202f% of all"
    assert lines[1] == "diff-in: AUROC 0.938, average precision 0.833, precision 0.500 at the true number"
    assert [line.partition(":")[0] for line in lines[1:]] == ["diff-in", "similarity"], "utility is there already"
    tree = job.config.model_dump()
    other = parse_config(tree | {"select": tree["select"] | {"by": "-utility", "name": "turned"}})
    looking.show_plan(other)
    printed = capsys.readouterr().out.splitlines()
    assert f"wrong captions found by {lines[1]}" in printed
    assert [line for line in printed if "found by -utility: AUROC 0.062" in line]
    assert quality_lines(job) == lines, "a dry run notes nothing"
