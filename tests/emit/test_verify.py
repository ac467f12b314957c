"""Each kind of damage to a finished run is found, and nothing else is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.emit import verify_tars
from pipeline.emit.emit import emit
from pipeline.emit.summary import account
from pipeline.emit.verify import verify
from pipeline.errors import InputError
from pipeline.selection.summary import read_summary
from pipeline.store import marks, storage
from pipeline.store.fingerprint import Fingerprint
from tests.conftest import Bucket
from tests.emit import made_run
from tests.emit.damages import DAMAGES
from tests.emit.made_run import make_run
from tests.helpers import sample_members, write_shards, write_tar


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with pruned tars, one rejected pair, a second selection and a summary."""
    folder = tmp_path_factory.mktemp("sound")
    shards = write_shards(folder / "in", shards=3)
    shards.append(write_tar(folder / "in" / "00003.tar", sample_members("lonely", b"image", None)))
    options: dict[str, Any] = {"emit": {"materialize": True, "pairs_per_shard": 4}}
    for select in ({"keep": 0.25, "name": "quarter"}, {"keep": 0.5}):
        made = make_run(folder / "run", shards, **options, select=select)
        emit(made.run, made.config, made.inventory)
    storage.write_json(made.run.summary, {"counts": account(read_summary(made.run, "default"))})
    return folder / "run"


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def test_a_sound_run_has_no_problems(sound: Path) -> None:
    assert verify(str(sound)) == []


def test_a_run_that_has_only_begun_has_none_either(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(sound / "inventory.parquet", tmp_path / "run")
    assert verify(str(tmp_path / "run")) == []
    shutil.copytree(sound / "scores", tmp_path / "run" / "scores")
    assert verify(str(tmp_path / "run")) == []


def test_a_folder_without_a_run_is_one_problem(tmp_path: Path) -> None:
    (problem,) = verify(str(tmp_path))
    assert "inventory.parquet: missing" in problem


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(run: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    damage(run)
    problems = verify(str(run))
    assert any(re.search(expected, problem) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    # What is broken is told where it is, not once per thing that depends on it.
    assert len(problems) <= 5, problems


def test_a_tar_that_cannot_be_read_now_is_not_called_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> list[str]:
        raise InputError(f"{url}: HTTP 503, service unavailable")

    monkeypatch.setattr(verify_tars, "read_keys", refuse)
    problems = verify(str(run))
    assert problems
    assert all(re.search(r"shards/0000\d\.tar: HTTP 503", problem) for problem in problems), problems


def test_an_inventory_that_is_none_is_one_problem(run: Path) -> None:
    (run / "inventory.parquet").write_bytes(b"no table")
    (problem,) = verify(str(run))
    assert "inventory.parquet: cannot be read: " in problem


def test_scores_of_another_regressor_and_one_that_changed_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = Fingerprint({**made_run.FINGERPRINT.parts, "sample": 0.5})
    regressor = b"weights"
    digest = storage.checksum(regressor)
    monkeypatch.setattr(made_run, "FINGERPRINT", Fingerprint({**sampled.parts, "regressor": digest}))
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=2))
    storage.write_bytes(made.run.regressor, regressor)
    marks.write_mark(made.run.regressor_mark, sampled, {"regressor": digest})
    assert verify(made.run) == []
    storage.write_bytes(made.run.regressor, b"other weights")
    assert [f"regressor.safetensors: changed since it was committed: its checksum is not {digest}" in problem
            for problem in verify(made.run)] == [True]  # fmt: skip
    marks.write_mark(made.run.regressor_mark, sampled, {"regressor": storage.checksum(b"other weights")})
    problems = verify(made.run)
    assert len(problems) == 2
    assert all("stale: predicted with another regressor" in problem for problem in problems)
    storage.remove(made.run.regressor)
    assert any("regressor.safetensors: missing, though its commit mark is there" in each for each in verify(made.run))


def test_a_sample_that_was_given_up_for_scoring_every_pair_is_no_problem(run: Path) -> None:
    begun = run / "sample" / "scores" / "00000.parquet"
    begun.parent.mkdir(parents=True)
    shutil.copy(run / "scores" / "00000.parquet", begun)
    assert verify(str(run)) == []


def test_a_run_that_has_not_come_to_selecting_needs_no_counts(run: Path) -> None:
    (run / "summary.json").write_text('{"seconds": {"train": 1.0}}')
    assert len(verify(str(run))) == 1
    for folder in ("pruned", "selections"):
        shutil.rmtree(run / folder)
    assert verify(str(run)) == []


def test_a_shard_that_was_set_aside_is_no_problem(sound: Path, run: Path, tmp_path: Path) -> None:
    shards = pq.read_table(sound / "inventory.parquet")["url"].to_pylist()
    made = make_run(tmp_path / "other", shards)
    for end in ("parquet", "json"):
        Path(made.run.score_file(1)).with_suffix(f".{end}").unlink()
    storage.write_json(made.run.failure_file(1), {"item": 1})
    from pipeline.selection.select import select

    select(made.run, made.config.select, seed=0)
    emit(made.run, made.config, made.inventory)
    assert verify(made.run) == []
    line = json.loads(Path(made.folder.manifest).read_text().splitlines()[1])
    assert (line["num_kept"], line["keep"]) == (0, None)


def test_a_run_on_an_object_store(tmp_path: Path, s3_bucket: Bucket) -> None:
    shards = write_shards(tmp_path / "in", shards=2)
    made = make_run(f"{s3_bucket.url}/run", shards, emit={"materialize": True, "pairs_per_shard": 5})
    summary = emit(made.run, made.config, made.inventory)
    assert summary.tars == 2
    assert verify(made.run.root) == []
    text = storage.read_bytes(made.folder.train_script).decode()
    assert f"'pipe:aws s3 cp {s3_bucket.url}/run/pruned/shards/{{00000..00001}}.tar -'" in text
    storage.write_bytes(f"{made.folder.shards}/00000.tar", b"short")
    storage.remove(f"{made.folder.root}/keep/00001.parquet")
    problems = verify(made.run.root)
    assert any("00000.tar: truncated" in problem for problem in problems)
    assert any("keep/00001.parquet: missing" in problem for problem in problems)
