"""What is said before models are trained to judge a choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from pipeline.config import parse_config
from pipeline.evaluation.results import Result
from pipeline.stages import evaluating
from pipeline.stages.evaluating import _Training, _warn_of_shared_shards, evaluate
from pipeline.stages.evaluation_sets import WrittenSet
from pipeline.stages.job import Job
from pipeline.stages.summary import _add_results
from pipeline.store import storage
from pipeline.store.pulse import read_pulse
from tests.emit.made_run import make_run


def test_measuring_on_pairs_that_were_used_is_said(
    make_shards: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(shards=4)
    config = parse_config({"data": {"shards": shards[:2]}, "evaluate": {"shards": shards[2:]}})
    _warn_of_shared_shards(config)
    assert capsys.readouterr().err == ""
    shared = parse_config(
        {
            "data": {"shards": shards[:2]},
            "target": {"kind": "shards", "shards": shards[2:]},
            "evaluate": {"shards": shards[1:]},
        }
    )
    _warn_of_shared_shards(shared)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"evaluate: 1 shard of evaluate.shards, {shards[1]} first, also named by data.shards")
    assert second.startswith(f"evaluate: 2 shards of evaluate.shards, {shards[2]} first, also named by target.shards")


def test_trainings_ask_for_the_gpus_of_a_proxy_run(
    make_shards: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class AskedError(Exception):
        pass

    def run_tasks(*_: Any, gpus: float, **__: Any) -> None:
        raise AskedError(gpus)

    monkeypatch.setattr(evaluating, "run_task", lambda *_, **__: [])
    monkeypatch.setattr(evaluating, "shard_versions", lambda *_: [])
    monkeypatch.setattr(evaluating, "run_tasks", run_tasks)
    shards = make_shards(shards=2)
    sections = {"data": {"shards": shards[:1]}, "evaluate": {"shards": shards[1:]}, "proxy": {"gpus_per_worker": 0.25}}
    with pytest.raises(AskedError, match=r"0\.25"):
        evaluate(Job(parse_config({"out": str(tmp_path / "run"), **sections})))


def test_what_interrupted_trainings_said_of_themselves_is_forgotten(
    make_shards: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class BegunError(Exception):
        pass

    def run_tasks(function: object, trainings: list[_Training], **_: Any) -> None:
        raise BegunError([read_pulse(training.pulse) for training in trainings])

    shards = make_shards(shards=2)
    made = make_run(tmp_path / "run", shards[:1], evaluate={"shards": shards[1:]})
    pairs = WrittenSet("kept", "kept 50 %", 0.5, 0, "file", "checksum")
    job = Job(made.config)
    monkeypatch.setattr(evaluating, "run_task", lambda *_, **__: [pairs])
    monkeypatch.setattr(evaluating, "shard_versions", lambda *_: [])
    monkeypatch.setattr(evaluating, "gpus_for_a_task", lambda given: 0.0)
    monkeypatch.setattr(evaluating, "run_tasks", run_tasks)
    storage.write_json(evaluating._training(job, pairs, []).pulse, {"step": 9, "steps": 10})
    with pytest.raises(BegunError, match=r"\[None\]"):
        evaluate(job)


def verdicts(results: list[Result]) -> list[str]:
    """What the table at the end says of the kept sets."""
    _add_results(table := Table("", ""), results)
    return [line for line in map(str, table.columns[1].cells) if " trains " in line]


def test_the_kept_set_is_held_against_sets_of_its_size_and_everything() -> None:
    def result(series: str, percent: int, *values: float) -> Result:
        share = None if series == "full" else percent / 100
        return Result.of(f"{series} {percent}", series, share, percent, "accuracy", list(values))

    kept, random, full = (
        result("kept", 50, 0.54, 0.56),
        result("random", 50, 0.3, 0.31),
        result("full", 100, 0.52, 0.54),
    )
    assert verdicts([kept, random, full]) == [
        "what was kept trains better than random 50 (+0.245)",
        "what was kept trains like full 100, within noise (+0.020)",
    ]
    more, other = result("kept", 70, 0.2, 0.21), result("random", 70, 0.3, 0.31)
    assert verdicts([kept, random, more, other, full]) == [
        "kept 50 trains better than random 50 (+0.245)",
        "kept 50 trains like full 100, within noise (+0.020)",
        "kept 70 trains worse than random 70 (-0.100)",
        "kept 70 trains worse than full 100 (-0.325)",
    ]
    assert verdicts([result("kept", 50, 0.5), full]) == []


def test_sets_are_held_against_each_other_by_their_share_though_pairs_are_lost() -> None:
    sizes = {0.3: 9, 0.7: 20}
    kept = [Result.of(f"kept {share}", "kept", share, size, "accuracy", [0.5, 0.5]) for share, size in sizes.items()]
    random = [Result.of(f"random {share}", "random", share, 9, "accuracy", [0.4, 0.4]) for share in (0.3, 0.7)]
    assert verdicts([*kept, *random]) == [
        "kept 0.3 trains better than random 0.3 (+0.100)",
        "kept 0.7 trains better than random 0.7 (+0.100)",
    ]
