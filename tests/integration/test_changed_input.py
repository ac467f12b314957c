"""Files that changed under the same name are noticed: input and target shards, checkpoints, a model's JSON file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.inventory import inspect_shard, read_inventory, write_inventory
from pipeline.emit.emit import emit
from pipeline.emit.verify import verify
from pipeline.errors import FingerprintError, InputError
from pipeline.models.checkpoint import save_checkpoint
from pipeline.models.clip import build_model, split_state
from pipeline.models.manifest import Manifest, ManifestEntry
from pipeline.run import RunFolder
from pipeline.selection.summary import read_summary
from pipeline.stages import training, versions
from pipeline.stages.directions import directions_fingerprint
from pipeline.stages.job import Job
from pipeline.stages.runner import run_all
from pipeline.store import storage
from pipeline.store.commits import read_marks
from pipeline.types import Checkpoint
from tests.emit.made_run import make_run
from tests.helpers import write_shards
from tests.integration.runs import small_config


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_an_input_that_changed_is_refused_and_replaced_when_asked_for(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", shards=3, samples=12)
    other = write_shards(tmp_path / "other", shards=2, samples=12, seed=1)
    folder = RunFolder(str(tmp_path / "run"))
    run_all(small_config(shards, folder.root))
    before = {mark.shard: mark.checksum for mark in read_marks(folder)}

    os.replace(other[1], shards[1])
    with pytest.raises(FingerprintError, match=r"in/00001\.tar: expected the shard of the inventory .*stale=redo"):
        run_all(small_config(shards, folder.root))
    assert {mark.shard: mark.checksum for mark in read_marks(folder)} == before

    redo = {"stale": "redo"}
    run_all(small_config(shards, folder.root, engine=redo))
    assert [info.etag for info in read_inventory(folder.inventory)] == [inspect_shard(0, url).etag for url in shards]
    assert verify(folder) == []

    run_all(small_config(shards[:2], folder.root, engine=redo))
    summary = read_summary(folder, "default")
    assert (summary.total, summary.kept, len(summary.shards)) == (24, 12, 2)
    assert storage.read_json(folder.summary)["scores"]["scored_shards"] == 2
    assert verify(folder) == []

    direction, used = Path(folder.directions, "00000.safetensors"), Manifest.read(folder.checkpoint_manifest)
    direction.write_bytes(direction.read_bytes()[:-1] + b"x")
    Path(used.checkpoints[1].path).unlink()
    assert sorted(problem.split(": ")[1].split(" though")[0].split(" since")[0] for problem in verify(folder)) == [
        "changed", "missing,"
    ]  # fmt: skip


def checkpoint(folder: Path, name: str, seed: int) -> str:
    params, buffers = split_state(build_model("digits-vit", seed=seed))
    url = str(folder / name)
    save_checkpoint(url, Checkpoint(4, 1e-3, 0, {key: value.clone() for key, value in params.items()}, buffers))
    return url


@pytest.fixture
def with_inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Makes jobs of one run with an inventory; tasks run in this process."""
    for module in (training, versions):
        monkeypatch.setattr(module, "run_task", lambda function, item, **_: function(item))
    shards = write_shards(tmp_path / "in", shards=2, samples=10)
    write_inventory(RunFolder(str(tmp_path / "run")).inventory, [inspect_shard(n, url) for n, url in enumerate(shards)])

    def job(**sections: Any) -> Job:
        return Job(small_config(shards, tmp_path / "run", **sections))

    return job


@pytest.mark.parametrize("listed", [False, True])
def test_a_checkpoint_that_was_overwritten_is_taken_over_again(
    tmp_path: Path, with_inventory: Callable[..., Job], listed: bool
) -> None:
    source = checkpoint(tmp_path, "a.safetensors", 0)
    sources = [source]
    if listed:
        sources = [str(tmp_path / "manifest.json")]
        Manifest(20, "sgd", (ManifestEntry(source, 4, 1e-3),)).write(sources[0])
    job = with_inventory(proxy={"checkpoints": sources})
    training.train(job)
    (entry,) = Manifest.read(job.folder.checkpoint_manifest).checkpoints
    first = storage.file_checksum(entry.path)
    training.train(job)
    assert storage.file_checksum(entry.path) == first

    size = os.path.getsize(source)
    os.replace(checkpoint(tmp_path, "b.safetensors", 1), source)
    assert os.path.getsize(source) == size
    with pytest.raises(FingerprintError, match="sources"):
        training.train(job)
    training.train(with_inventory(proxy={"checkpoints": sources}, engine={"stale": "redo"}))
    assert storage.file_checksum(entry.path) != first


def test_directions_depend_on_the_content_of_model_and_target(
    tmp_path: Path, with_inventory: Callable[..., Job]
) -> None:
    model = tmp_path / "model.json"
    tree = json.loads((Path(training.__file__).parents[1] / "models/configs/digits-vit.json").read_text())
    model.write_text(json.dumps(tree))
    target = write_shards(tmp_path / "target", shards=1, samples=10)
    other = write_shards(tmp_path / "other", shards=1, samples=10, seed=1)

    def fingerprint(size: int = 20, **loss: Any) -> str:
        aim = {"kind": "shards", "shards": target, "pairs": 4, **loss}
        job = with_inventory(proxy={"model": str(model)}, target=aim)
        return directions_fingerprint(job, ["digest"], size).digest

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(size=21) != first
    assert fingerprint(loss="contrastive") == first
    assert fingerprint(loss="margin") != first
    model.write_text(json.dumps({**tree, "quick_gelu": True}))
    changed = fingerprint()
    assert changed != first
    model.write_text(json.dumps(tree))
    assert fingerprint() == first
    shutil.copyfile(other[0], target[0])
    assert fingerprint() != first


def test_pruned_tars_are_not_written_of_a_shard_that_changed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", shards=2)
    made = make_run(tmp_path / "run", shards)
    os.replace(write_shards(tmp_path / "other", shards=2, seed=1)[1], shards[1])
    tars = made.config.emit.model_copy(update={"pairs_per_shard": 3, "materialize": True})
    with pytest.raises(InputError, match=r"00001\.tar: expected the shard of the inventory"):
        emit(made.run, made.config.model_copy(update={"emit": tars}), made.inventory)
