"""What is said where a config is not that of the scores or of the selection that a stage makes use of."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.emit.emit import here
from pipeline.engine.scorer_spec import score_fingerprint
from pipeline.prepared import settings_of
from pipeline.selection.select import select
from pipeline.stages import looking, runner
from pipeline.stages.agreeing import say_other_scores, say_other_selection
from pipeline.stages.job import Job
from tests.emit import made_run
from tests.emit.made_run import MadeRun, make_run
from tests.helpers import write_shards


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """Scores with the fingerprint that the score stage would give them."""
    shards = write_shards(tmp_path / "in", shards=3)
    config = parse_config({"out": "x", "data": {"shards": shards}, "select": {"keep": 0.5}})
    score = asdict(settings_of(config))
    del score["target_loss"]  # as in a score's fingerprint, where it is not the margin
    basis = {"score": score, "images": {"size": [32, 32]}}
    monkeypatch.setattr(made_run, "FINGERPRINT", score_fingerprint(config, ["abc"], basis))
    return make_run(tmp_path / "run", shards)


def job_of(made: MadeRun, **sections: Any) -> Job:
    tree = made.config.model_dump(mode="json")
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    return Job(parse_config(tree))


def test_nothing_is_said_of_the_settings_that_were_used(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    for sections in ({}, {"score": {"batch_size": 7}}, {"engine": {"prefetch": 1}}, {"emit": {"shuffle": True}}):
        say_other_scores(job_of(made, **sections), "select")
        say_other_selection(job_of(made, **sections), "emit")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"score": {"estimator": "tracin"}}, 'score.estimator: "diff-in" there, "tracin" now'),
        ({"proxy": {"loss": "siglip"}}, 'proxy.loss: "clip" there, "siglip" now'),
        ({"reference": {"equal_captions": "ignore"}}, 'reference.equal_captions: "negative" there, "ignore" now'),
        ({"target": {"loss": "margin"}}, 'target.loss: "contrastive" there, "margin" now'),
        ({"data": {"caption": "json:caption"}}, 'data.caption: "txt" there, "json:caption" now'),
        ({"data": {"draft": 2}}, "data.draft: null there, 2.0 now"),
    ],
)
def test_scores_of_other_settings_are_named_in_one_line(
    made: MadeRun, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], named: str
) -> None:
    say_other_scores(job_of(made, **sections), "report")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"report: warning: the scores used were made with other settings than the config's: {named}"


def test_scores_of_other_shards_are_named(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    shards = made.config.data.shards
    say_other_scores(job_of(made, data={"shards": [shards[1], shards[0], shards[2]]}), "emit")
    say_other_scores(job_of(made, data={"shards": shards[:2]}), "emit")
    swapped, fewer = capsys.readouterr().err.splitlines()
    assert swapped.endswith(f'data.shards[0]: "{shards[0]}" there, "{shards[1]}" now')
    assert fewer.endswith(f'data.shards[2]: "{shards[2]}" there, nothing now')


def test_a_selection_of_other_settings_is_named_in_one_line(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    say_other_selection(job_of(made, select={"keep": 0.25, "by": "similarity"}, seed=3), "emit")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "emit: warning: 'default' was selected with other settings than the config's: seed: 0 there, 3 now; "
        'select.by: "utility" there, "similarity" now; select.keep: 0.5 there, 0.25 now'
    )


def test_a_dry_run_says_so_too(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    looking.show_plan(job_of(made, score={"estimator": "tracin"}).config)
    assert "select: warning: the scores used were made with other settings" in capsys.readouterr().err


def test_stages_after_the_scores_say_so(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "connect": lambda engine: nullcontext(),
        "_prepare": lambda config, proxy: None,
        "ordered_map": lambda *_: map,
        "apart": lambda *_: here,
        "run_task": lambda function, item, **_: "page",
        "select_pairs": lambda job: None,
    }.items():
        monkeypatch.setattr(runner, name, value)
    select(made.run, made.config.select.model_copy(update={"name": "q", "by": "-utility", "keep": 6}), seed=0)
    config = job_of(made, select={"name": "q"}, emit={"materialize": True}, score={"estimator": "tracin"}).config
    for stage in ("select", "emit", "report"):
        runner.run_stage(stage, config)
    lines = [line.partition(": score.")[0].partition(": select.")[0] for line in capsys.readouterr().err.splitlines()]
    scores = "warning: the scores used were made with other settings than the config's"
    selection = "warning: 'q' was selected with other settings than the config's"
    assert lines == [
        f"select: {scores}", "select: 6 of 24 pairs kept",
        f"emit: {scores}", f"emit: {selection}", f"emit: 1 tar in {made.run.selection('q')}",
        "emit: train.sh starts at most 1 worker, as more would not all fill batches of 6 "
        "(for more, lower emit.pairs_per_shard or emit.train_batch_size)",
        f"report: {scores}", f"report: {selection}", "report: page",
    ]  # fmt: skip
