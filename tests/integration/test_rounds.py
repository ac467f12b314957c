"""Held-out scores, a second round of proxies on what the first kept, and the comparison by training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config import Config
from pipeline.data.decode import uid_to_id
from pipeline.errors import StageError
from pipeline.replay.record import trained_ids
from pipeline.run import RunFolder
from pipeline.selection.scan import committed_shards
from pipeline.stages.runner import run_all, run_stage
from pipeline.store import storage
from tests.helpers import image_bytes, sample_members, uid_of, write_tar
from tests.integration.runs import small_config

pytestmark = pytest.mark.ray

SHARDS, EACH = 2, 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pairs of four captions, and a truth that says that every third is wrong."""
    folder = tmp_path_factory.mktemp("input")
    words = ["red", "green", "blue", "grey"]
    paths = []
    for shard in range(SHARDS):
        members = []
        for number in range(shard * EACH, (shard + 1) * EACH):
            meta = {"uid": uid_of(number), "label": number % 4}
            members += sample_members(f"{number:06d}", image_bytes(seed=number), f"a {words[number % 4]} thing", meta)
        paths.append(write_tar(folder / f"{shard:05d}.tar", members))
    lines = [f"{uid_of(number)},a,{'b' if number % 3 == 0 else 'a'}" for number in range(SHARDS * EACH)]
    (folder / "truth.csv").write_text("\n".join(["uid,clean,caption_class", *lines]))
    return paths


def config_of(shards: list[str], out: Path, **proxy: object) -> Config:
    return small_config(
        shards,
        out,
        target={"pairs": 8, "kind": "shards", "shards": shards[0]},
        proxy={"runs": 2, "subset": 0.5, "batch_size": 8, **proxy},
        score={"estimator": "tracin", "held_out": True},
        emit={"materialize": False},
    )


@pytest.fixture(scope="module")
def first(shards: list[str], tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> RunFolder:
    config = config_of(shards, tmp_path_factory.mktemp("rounds") / "first")
    for stage in ("inventory", "train", "directions", "score", "select"):
        run_stage(stage, config)
    return RunFolder(config.out)


def rows_of(run: RunFolder) -> list[dict[str, object]]:
    return [row for shard in range(SHARDS) for row in pq.read_table(run.score_file(shard)).to_pylist()]


def counted(run: RunFolder) -> np.ndarray:
    """Which run scored which pair, `[pairs, runs]`."""
    return np.array([[term is not None for term in row["terms"][::2]] for row in rows_of(run)])  # type: ignore[index]


def seen(run: RunFolder) -> np.ndarray:
    """Which run trained on which pair, `[pairs, runs]`."""
    ids = [uid_to_id(str(row["uid"])) for row in rows_of(run)]
    return np.stack([np.isin(ids, trained_ids(run, number)) for number in range(2)], 1)


def test_each_pair_is_scored_by_the_runs_that_did_not_see_it(first: RunFolder) -> None:
    assert np.array_equal(counted(first), ~seen(first))
    assert (counted(first).sum(1) == 1).all()
    for row in rows_of(first):
        terms = [term for term in row["terms"] if term is not None]  # type: ignore[attr-defined]
        assert row["score"] == pytest.approx(sum(terms), rel=1e-5)
        assert row["utility_std"] is None
    assert committed_shards(first)[1]
    assert all(storage.read_json(first.score_mark(n))["parts"]["held_out"] is True for n in range(SHARDS))


@pytest.mark.slow
def test_a_second_round_trains_on_what_the_first_kept_and_scores_everything(
    first: RunFolder, shards: list[str], tmp_path: Path
) -> None:
    config = config_of(shards, tmp_path / "second", within=first.selection())
    run_all(config)
    second = RunFolder(config.out)
    kept = np.zeros(SHARDS * EACH, bool)
    for shard in range(SHARDS):
        index = pq.read_table(f"{first.selection()}/keep/{shard:05d}.parquet")["index"].to_numpy()
        kept[shard * EACH + index] = True
    assert not seen(second)[~kept].any()
    assert np.array_equal(counted(second), ~seen(second))
    assert (counted(second)[~kept]).all()
    assert (counted(second)[kept].sum(1) >= 1).all()
    assert all(row["status"] == "ok" for row in rows_of(second))

    swapped = config_of(shards[::-1], tmp_path / "swapped", within=first.selection())
    run_stage("inventory", swapped)
    with pytest.raises(StageError, match=r"expected a selection over the same shards, found 00000.tar with 24"):
        run_stage("train", swapped)
    nowhere = config_of(shards, tmp_path / "nowhere", within=str(tmp_path))
    run_stage("inventory", nowhere)
    with pytest.raises(StageError, match=r"expected the folder of a finished selection"):
        run_stage("train", nowhere)


def test_evaluate_compares_choices_at_several_sizes_and_repeats_no_training(
    first: RunFolder, shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(shards, Path(first.root))
    evaluate = {
        "shards": shards[1],
        "truth": str(Path(shards[0]).parent / "truth.csv"),
        "seeds": 2,
        "steps": 3,
        "baselines": ["full", "random", "clip-score", "right-only"],
        "compare": {"low": {"by": "-utility"}},
        "keeps": [0.25, 0.5],
    }
    tree = config.model_dump() | {"evaluate": evaluate}
    run_stage("evaluate", Config.model_validate(tree))
    rows = json.loads((Path(first.root) / "evaluation" / "results.json").read_text())["rows"]
    sizes = {row["set"]: row["size"] for row in rows}
    assert sizes == {
        **{
            f"{name} {share} %": size
            for name in ("kept", "clip-score", "low", "random")
            for share, size in ((25, 12), (50, 24))
        },
        "only right captions": 32,
        "everything": 48,
    }
    assert {row["series"] for row in rows} == {"kept", "clip-score", "low", "random", "right-only", "full"}
    assert all(len(row["values"]) == 2 and row["metric"] == "zero-shot accuracy" for row in rows)
    marks = Path(first.root) / "evaluation" / "trainings"
    before = {path.name: path.stat().st_mtime_ns for path in marks.iterdir()}
    assert len(before) == 20
    board = EventAccumulator(str(Path(first.root) / "tensorboard" / "evaluation" / "random-25-seed-1"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    (measured,) = (row["values"][1] for row in rows if row["set"] == "random 25 %")
    assert [(event.step, event.value) for event in board.Scalars("zero-shot_accuracy")] == [
        (3, pytest.approx(measured))
    ]

    tree["evaluate"] = evaluate | {"compare": {"low": {"by": "-utility"}, "high loss": {"by": "loss"}}, "seeds": 1}
    capsys.readouterr()
    run_stage("evaluate", Config.model_validate(tree))
    after = {path.name: path.stat().st_mtime_ns for path in marks.iterdir()}
    assert after | before == after
    assert len(after) == 22
