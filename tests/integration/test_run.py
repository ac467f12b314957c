from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cli import invoke
from pipeline.config import dump_config
from pipeline.emit.verify import verify
from pipeline.errors import FingerprintError, InputError, StageError
from pipeline.reference import outputs_reference
from pipeline.run import RunFolder
from pipeline.stages.runner import run_all, run_stage
from tests.helpers import Member, image_bytes, sample_members, uid_of, write_tar
from tests.integration.runs import small_config
from tests.web import WebServer

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards, the second with one sample without a caption and one with a broken image."""
    folder = tmp_path_factory.mktemp("input")
    paths = []
    for shard in range(3):
        members: list[Member] = []
        for number in range(8 * shard, 8 * shard + 8):
            image: bytes = image_bytes(seed=number)
            caption: str | None = f"a thing called number {number}"
            if number == 9:
                caption = None
            if number == 12:
                image = b"no image at all"
            members += sample_members(f"{number:06d}", image, caption, {"uid": uid_of(number)})
        paths.append(write_tar(folder / f"{shard:05d}.tar", members))
    return paths


@pytest.fixture(scope="module")
def finished(shards: list[str], tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> RunFolder:
    folder = RunFolder(str(tmp_path_factory.mktemp("run") / "run"))
    run_all(small_config(shards, folder.root))
    return folder


def files_of(root: str) -> dict[str, int]:
    """Time of change of every file below a folder, in nanoseconds."""
    return {
        os.path.join(where, name): os.stat(os.path.join(where, name)).st_mtime_ns
        for where, _, names in os.walk(root)
        for name in names
    }


def recorded(folder: RunFolder) -> dict[str, Any]:
    """What `config.yaml` holds."""
    tree: dict[str, Any] = yaml.safe_load(Path(folder.config).read_text())
    return tree


def scores_of(folder: RunFolder, shards: int = 3) -> list[dict[str, object]]:
    return [row for shard in range(shards) for row in pq.read_table(folder.score_file(shard)).to_pylist()]


def test_a_run_writes_what_the_contract_names(finished: RunFolder, shards: list[str]) -> None:
    root = Path(finished.root)
    rows = scores_of(finished)
    assert [row["uid"] for row in rows] == [uid_of(number) for number in range(24)]
    assert {row["uid"]: row["status"] for row in rows if row["status"] != "ok"} == {
        uid_of(9): "no-caption",
        uid_of(12): "corrupt-image",
    }
    for row in rows:
        if row["status"] == "ok":
            assert row["score"] == pytest.approx(sum(row["terms"]), rel=1e-5)
            assert row["utility"] == -row["score"]
            assert len(row["terms"]) == 2
    summary = json.loads((root / "summary.json").read_text())
    assert summary["counts"]["in"] == 24
    assert summary["counts"]["kept"] == 11
    assert summary["counts"]["rejected"] == 2
    manifest = [json.loads(line) for line in (root / "pruned" / "manifest.jsonl").read_text().splitlines()]
    assert [line["url"] for line in manifest] == shards
    assert sum(line["num_kept"] for line in manifest) == 11
    uids = np.load(root / "pruned" / "uids.npy")
    assert uids.dtype == np.dtype("u8,u8")
    assert len(uids) == 11
    assert (np.sort(uids) == uids).all()
    sizes = json.loads((root / "pruned" / "shards" / "sizes.json").read_text())
    assert list(sizes) == ["00000.tar", "00001.tar", "00002.tar"]
    assert sum(sizes.values()) == 11
    assert "--train-num-samples" in (root / "pruned" / "train.sh").read_text()
    assert "<html" in (root / "report" / "index.html").read_text()
    assert recorded(finished)["config"]["select"]["keep"] == 0.5
    assert recorded(finished)["versions"]["torch"]
    assert recorded(finished)["fingerprint"]
    checkpoints = json.loads((root / "checkpoints" / "manifest.json").read_text())
    assert [entry["step"] for entry in checkpoints["checkpoints"]] == [3, 6]


def test_every_file_of_a_run_is_described(finished: RunFolder) -> None:
    described = re.findall(r"^\| `([^`]+)` \|", outputs_reference().split("\n## ")[1], re.MULTILINE)
    patterns = [re.sub(r"\d+", r"\\d+", re.escape(path)) for path in described]
    known = re.compile("|".join(f"{path}.*" if path.endswith("/") else path for path in patterns))
    files = {os.path.relpath(path, finished.root) for path in files_of(finished.root)}
    assert {path for path in files if not known.fullmatch(path)} == set()


def test_a_finished_run_verifies_and_reports_its_status(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(finished) == []
    assert invoke(["verify", finished.root]) == 0
    assert invoke(["status", finished.root]) == 0
    assert "3" in capsys.readouterr().out


def test_started_again_a_finished_run_rewrites_no_result(finished: RunFolder, shards: list[str]) -> None:
    before = files_of(finished.root)
    run_all(small_config(shards, finished.root))
    after = files_of(finished.root)
    changed = {os.path.relpath(path, finished.root) for path in after if after[path] != before.get(path)}
    assert {path for path in changed if not path.startswith(("report", "summary.json", "config.yaml"))} == set()


def test_what_killed_writers_left_is_gone_when_the_run_is_complete(finished: RunFolder, shards: list[str]) -> None:
    root = Path(finished.root)
    folders = ["", "places", "checkpoints/run-000", "cache", "directions/marks", "scores", "sample", "pruned/shards"]
    for folder in folders:
        (root / folder).mkdir(exist_ok=True)
        (root / folder / ".tmp-0123-half").write_bytes(b"half")
    (root / "pruned" / ".tmp-runs").mkdir()
    assert len(verify(finished)) == len(folders) + 1
    run_all(small_config(shards, finished.root))
    assert verify(finished) == []
    assert not list(root.rglob(".tmp-*"))


def test_another_keep_selects_anew_and_scores_nothing(finished: RunFolder, shards: list[str]) -> None:
    before = files_of(finished.scores)
    config = small_config(shards, finished.root, select={"keep": 5, "name": "five"})
    run_stage("select", config)
    run_stage("emit", config)
    assert files_of(finished.scores) == before
    assert len(np.load(Path(finished.selection("five")) / "uids.npy")) == 5


def test_other_settings_are_refused_and_named(finished: RunFolder, shards: list[str]) -> None:
    before = Path(finished.config).read_bytes()
    estimator = {"score": {"estimator": "tracin"}}, r"score\.estimator: \"diff-in\" there, \"tracin\" now"
    pixels = {"data": {"draft": 2.0}}, r"draft: nothing there, 2\.0 now"
    for sections, named in (estimator, pixels):
        for run in (run_all, partial(run_stage, "score")):
            with pytest.raises(FingerprintError, match=named):
                run(small_config(shards, finished.root, **sections))
    assert Path(finished.config).read_bytes() == before


@pytest.mark.slow
def test_other_settings_are_redone_when_asked_for(shards: list[str], tmp_path: Path, ray_local: None) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    run_all(small_config(shards, folder.root))
    first = scores_of(folder)
    run_all(small_config(shards, folder.root, score={"estimator": "tracin"}, engine={"stale": "redo"}))
    second = scores_of(folder)
    assert [row["uid"] for row in first] == [row["uid"] for row in second]
    assert first[0]["score"] != second[0]["score"]
    assert second[0]["utility"] == second[0]["score"]
    assert verify(folder) == []


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("train", "inventory"), ("directions", "train"), ("score", "directions"), ("select", "inventory")],
)
def test_a_stage_refuses_before_the_one_before_it(
    shards: list[str], tmp_path: Path, ray_local: None, stage: str, missing: str
) -> None:
    with pytest.raises(StageError, match=f"run `diffprune {missing} CONFIG` first"):
        run_stage(stage, small_config(shards, tmp_path / "run"))


def test_shards_without_samples_are_refused_before_training(tmp_path: Path, ray_local: None) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_text("not a tar")
    with pytest.raises(InputError, match=r"broken\.tar: expected image-text pairs, found none here \(.*truncated"):
        run_all(small_config([str(broken)], tmp_path / "run"))


def test_stage_by_stage_equals_the_whole(finished: RunFolder, shards: list[str], tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(dump_config(small_config(shards, tmp_path / "run")))
    folder = RunFolder(str(tmp_path / "run"))
    fingerprint = recorded(finished)["fingerprint"]
    for stage, made in (("inventory", None), ("train", None), ("directions", fingerprint), ("score", fingerprint)):
        assert invoke([stage, str(config)]) == 0
        assert recorded(folder)["fingerprint"] == made
    before = Path(folder.config).read_bytes()
    assert recorded(folder)["config"] == {**recorded(finished)["config"], "out": folder.root}
    for stage in ("select", "emit", "report"):
        assert invoke([stage, str(config), "--set", "score.embeddings=true"]) == 0
    assert Path(folder.config).read_bytes() == before
    for shard in range(3):
        assert Path(folder.score_file(shard)).read_bytes() == Path(finished.score_file(shard)).read_bytes()
    for name in ("uids.npy", "shards/00000.tar", "shards/00002.tar", "keep/00001.parquet"):
        mine, theirs = Path(folder.selection()) / name, Path(finished.selection()) / name
        assert mine.read_bytes() == theirs.read_bytes()


def test_scores_do_not_depend_on_batches_or_workers(
    finished: RunFolder, shards: list[str], tmp_path: Path, ray_local: None
) -> None:
    config = small_config(shards, tmp_path / "run", score={"batch_size": 3}, engine={"workers": 1, "prefetch": 2})
    run_all(config)
    ones, others = scores_of(finished), scores_of(RunFolder(config.out))
    assert [row["status"] for row in ones] == [row["status"] for row in others]
    one, other = (np.array([row["score"] for row in rows if row["status"] == "ok"]) for rows in (ones, others))
    # float32 passes over batches of another shape round differently, and Diff-In's difference quotient amplifies that
    np.testing.assert_allclose(other, one, atol=1e-2 * np.abs(one).max())
    for left, right in zip(ones, others, strict=True):
        if left["status"] == "ok":
            assert right["similarity"] == pytest.approx(left["similarity"], abs=1e-5)
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)


def test_a_pair_is_selected_by_a_formula(finished: RunFolder, shards: list[str]) -> None:
    config = small_config(
        shards, finished.root, select={"name": "both", "by": "rank(utility) + rank(similarity)", "where": "width > 8"}
    )
    run_stage("select", config)
    kept = [row for shard in range(3) for row in pq.read_table(_keep(finished, "both", shard)).to_pylist()]
    assert len(kept) == 11


def _keep(folder: RunFolder, name: str, shard: int) -> str:
    return f"{folder.selection(name)}/keep/{shard:05d}.parquet"


def test_a_run_on_an_object_store_gives_the_same_bytes(
    finished: RunFolder, shards: list[str], s3_bucket: object, ray_local: None, make_shards: Callable[..., list[str]]
) -> None:
    import fsspec

    urls = s3_bucket.put(*shards)  # type: ignore[attr-defined]
    root = f"{s3_bucket.url}/run"  # type: ignore[attr-defined]
    run_all(small_config(urls, root))
    assert verify(root) == []
    with fsspec.open(f"{root}/pruned/uids.npy", "rb") as handle:
        assert handle.read() == (Path(finished.root) / "pruned" / "uids.npy").read_bytes()
    with fsspec.open(f"{root}/pruned/shards/00000.tar", "rb") as handle:
        assert handle.read() == (Path(finished.root) / "pruned" / "shards" / "00000.tar").read_bytes()


@pytest.mark.slow
def test_a_run_from_a_web_server_gives_the_same_bytes(
    finished: RunFolder, shards: list[str], tmp_path: Path, ray_local: None
) -> None:
    root = tmp_path / "run"
    with WebServer(Path(shards[0]).parent) as web:
        run_all(small_config(f"{web.url}/{{00000..00002}}.tar", root))
    assert verify(str(root)) == []
    for name in ("uids.npy", "shards/00000.tar", "shards/00002.tar"):
        assert (root / "pruned" / name).read_bytes() == (Path(finished.root) / "pruned" / name).read_bytes()
