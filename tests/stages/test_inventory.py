"""Which shards a run knows, and when those of another list may take their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import FingerprintError
from pipeline.stages import inventory
from pipeline.stages.job import Job
from pipeline.store import storage
from tests.engine.prepared_run import prepare_run
from tests.helpers import write_shards


def test_shards_of_one_file_name_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    inventory._warn_of_equal_names(["a/0.tar", "b/1.tar"])
    assert not capsys.readouterr().err
    inventory._warn_of_equal_names(["a/0.tar", "b/1.tar", "s3://c/1.tar"])
    assert "2 shards are named 1.tar" in capsys.readouterr().err


def test_another_list_of_shards_replaces_no_inventory_that_something_was_made_of(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", shards=3, samples=20)
    config, _, _ = prepare_run(str(tmp_path / "run"), shards[:2], pairs=4)
    job = Job(config)
    storage.write_json(job.folder.score_mark(0), {})
    assert set(inventory._known_shards(job, shards[:2])) == {0, 1}
    for urls, difference in (
        (shards[:1], f"1 left out, {shards[1]} for one"),
        (shards[1:], f"1 left out, {shards[0]} for one; 1 added, {shards[2]} for one"),
        (shards[1::-1], "the same ones in another order"),
    ):
        with pytest.raises(FingerprintError, match="lists other shards than the config") as refused:
            inventory._known_shards(job, urls)
        assert difference in str(refused.value)
    redo = config.model_copy(update={"engine": config.engine.model_copy(update={"stale": "redo"})})
    assert inventory._known_shards(Job(redo), shards[:1]) == {}
    storage.remove(job.folder.score_mark(0))
    storage.remove(job.folder.checkpoint_manifest)
    assert inventory._known_shards(job, shards[:1]) == {}
