"""Status from files alone."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.inventory import write_inventory
from pipeline.emit.emit import selection_digests
from pipeline.emit.manifest import SelectionFolder
from pipeline.engine.failures import Aside, Failure, set_aside
from pipeline.engine.status import print_status, run_status
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection.summary import SelectionSummary, summary_file, write_summary
from pipeline.store import storage
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.marks import write_mark
from tests.engine.fakes import FINGERPRINT, fake_table, shard_infos


def test_counts_rate_and_failures_come_from_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shards = RunFolder(str(tmp_path)), shard_infos(10)
    with pytest.raises(StageError, match="expected a run's folder"):
        run_status(str(tmp_path))
    storage.write_bytes(run.config, b"seed: 0\n")
    assert not run_status(str(tmp_path)).inventoried
    write_inventory(run.inventory, shards)
    for place in range(4):
        commit_scores(
            run,
            shards[place],
            fake_table(shards[place]),
            FINGERPRINT,
            estimator="fake",
            seconds={},
            finished=1000.0 + 10 * place,
            worker=str(place % 2),
        )
    set_aside(run.failure_file(7), Aside(7, "00007.tar", Failure("OSError", "torn"), attempts=4))
    for broken in (None, [], {}, {"time": "now"}):
        if broken is not None:
            storage.write_json(run.driver, broken)
        assert run_status(str(tmp_path)).driver == ""
    storage.write_json(run.driver, {"process": 12, "host": "head", "time": time.time() - 125})

    status = run_status(str(tmp_path))
    assert (status.shards, status.shards_done, status.shards_left) == (10, 4, 5)
    assert (status.pairs, status.pairs_done, status.rejected) == (200, 80, 8)
    assert status.reasons == {"no-image": 8}
    assert [aside.item for aside in status.failed] == [7]
    assert (status.pairs_per_second, status.seconds_left) == (pytest.approx(2.0), pytest.approx(50.0))
    assert status.stages == {
        "inventory": True,
        "train": False,
        "directions": False,
        "score": False,
        "select": False,
        "emit": False,
        "report": False,
    }
    print_status(str(tmp_path))
    printed = capsys.readouterr().out
    assert "driver" in printed
    assert "process 12 on head, last sign of life 2 min ago" in printed
    assert "4 done, 1 failed, 5 left" in printed
    assert "2 pairs/s on 2 workers" in printed
    assert "failed: 00007.tar: OSError: torn" in printed


def test_one_worker_is_one_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shards = RunFolder(str(tmp_path)), shard_infos(2)
    storage.write_bytes(run.config, b"seed: 0\n")
    write_inventory(run.inventory, shards)
    for shard in shards:
        commit_scores(
            run,
            shard,
            fake_table(shard),
            FINGERPRINT,
            estimator="fake",
            seconds={},
            finished=1000.0 + shard.index,
            worker="0",
        )
    print_status(str(tmp_path))
    assert "20 pairs/s on 1 worker\n" in re.sub(" +\n", "\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["default", "half"])
def test_selecting_and_emitting_are_done_when_their_last_files_are_there(tmp_path: Path, name: str) -> None:
    run = RunFolder(str(tmp_path))
    write_inventory(run.inventory, shard_infos(1))
    folder = SelectionFolder(run.selection(name))

    def done() -> tuple[bool, bool]:
        stages = run_status(str(tmp_path)).stages
        return stages["select"], stages["emit"]

    storage.write_bytes(folder.keep(0), b"")
    assert done() == (False, False)
    summary = SelectionSummary(
        name, "", "scores", 0, {}, 4, 4, 2, {}, {}, None, 0, 0, groups=[], sources=[], shards=[], seconds={}
    )
    write_summary(summary_file(run, name), summary)
    assert done() == (True, False)
    storage.write_bytes(folder.manifest, b"")
    storage.write_bytes(folder.train_script, b"")
    assert done() == (True, False)
    write_mark(folder.mark, Fingerprint(selection_digests([], summary)), {})
    assert done() == (True, True)
    write_summary(summary_file(run, name), replace(summary, seconds={"rank": 3.0}))
    assert done() == (True, True)
    write_summary(summary_file(run, name), replace(summary, kept=3))
    assert done() == (True, False)


def test_a_folder_is_printed_as_it_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(str(tmp_path / "[/x]"))
    write_inventory(run.inventory, shard_infos(1))
    print_status(run.root)
    assert "[/x]" in "".join(capsys.readouterr().out.split())


def test_while_a_sample_is_scored_its_files_are_counted_and_then_those_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = RunFolder(str(tmp_path)), shard_infos(4)
    sample = RunFolder(run.sample)
    write_inventory(run.inventory, shards)

    def commit(where: RunFolder, place: int, finished: float) -> None:
        table, shard = fake_table(shards[place]), shards[place]
        commit_scores(where, shard, table, FINGERPRINT, estimator="fake", seconds={}, finished=finished, worker="0")

    commit(sample, 0, 1000.0)
    status = run_status(str(tmp_path))
    assert (status.sampling, status.shards_done, status.shards_left) == (True, 1, 3)
    assert (status.pairs_per_second, status.seconds_left) == (None, None)
    print_status(str(tmp_path))
    printed = capsys.readouterr().out
    assert "the pass that scores the sample" in printed
    assert "time left" not in printed

    for place in range(4):
        commit(run, place, 2000.0)
    given_up = run_status(str(tmp_path))
    for place in range(4):
        commit(sample, place, 1000.0 + place)
    storage.write_json(run.regressor_mark, {})
    for status in (given_up, run_status(str(tmp_path))):
        assert (status.sampling, status.stages["score"], status.shards_left) == (False, True, 0)
        assert status.pairs_per_second is None, "all of them were finished at the same moment"
