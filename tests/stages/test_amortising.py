"""Amortised scoring as a stage: refused where it cannot be trusted, the same bytes after a crash, selected as usual."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.config import EngineConfig
from pipeline.data.inventory import ShardInfo
from pipeline.emit.verify import verify
from pipeline.engine.failures import Aside, Failure, set_aside
from pipeline.engine.outcome import Outcome, pending_shards
from pipeline.engine.scoring import score_shards
from pipeline.engine.status import run_status
from pipeline.engine.tasks import TaskOutcome
from pipeline.engine.worker import WorkerSpec
from pipeline.errors import FingerprintError, StageError
from pipeline.evaluation.correlation import spearman
from pipeline.models.clip import build_model
from pipeline.models.manifest import Manifest
from pipeline.prepared import load_batches, score_basis
from pipeline.run import RunFolder
from pipeline.selection.select import select
from pipeline.stages import amortising, summary
from pipeline.stages.directions import directions_fingerprint
from pipeline.stages.job import Job
from pipeline.stages.scoring import score
from pipeline.store import marks, storage
from pipeline.store.commits import open_scores, read_marks, shard_fingerprint
from pipeline.store.fingerprint import Fingerprint
from tests.engine.prepared_run import outside_ray, prepare_run
from tests.helpers import write_shards

PAIRS = 300


def score_here(
    spec: WorkerSpec,
    shards: Sequence[ShardInfo],
    run: RunFolder,
    fingerprint: Fingerprint,
    config: EngineConfig,
    *,
    retry_failed: bool = False,
    title: str = "",
) -> Outcome:
    """`score_shards` in this process: one worker, no second attempt."""
    outcome = Outcome(total=len(shards))
    work = spec.build("0")
    for place in pending_shards(shards, run, fingerprint, config, outcome, retry_failed):
        shard = shards[place]
        try:
            work.commit(shard, work.score(shard, work.load(shard)), {"score": 1.0})
            outcome.done += 1
        except Exception as error:
            aside = Aside(shard.index, shard.url, Failure.of(error), 1, 0, shard_fingerprint(fingerprint, shard).digest)
            set_aside(run.failure_file(shard.index), aside)
            outcome.failed.append(aside)
    return outcome


def run_here(
    function: Callable[[Any], Any], items: list[Any], *, on_result: Callable[[int, Any], None], **_: Any
) -> TaskOutcome:
    """`run_tasks` in this process."""
    for number, item in enumerate(items):
        on_result(number, function(item))
    return TaskOutcome(len(items), len(items))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amortising, "score_shards", score_here)
    monkeypatch.setattr(amortising, "run_tasks", run_here)
    outside_ray(monkeypatch)


def make_job(folder: Path, shards: list[str] | None = None, **given: Any) -> Job:
    """A run up to the score stage; with one checkpoint per run similarities are linear in the regressor's features."""
    shards = shards or write_shards(folder / "in", shards=3, samples=PAIRS // 3)
    settings = {"estimator": "clip-score", "sample": 0.5, "batch_size": 50, **given}
    config, _, _ = prepare_run(str(folder / "run"), shards, runs=2, checkpoints=1, **settings)
    digests = [storage.file_checksum(url) for url in storage.list_files(RunFolder(config.out).checkpoints, "tensors")]
    job = Job(config.model_copy(update={"engine": config.engine.model_copy(update={"retry_wait": 0.01})}))
    basis = score_basis(config, load_batches(config.out), build_model(config.proxy.model).image_spec)
    size = Manifest.read(job.folder.checkpoint_manifest).dataset_size
    mark = {"checkpoints": digests, "dataset_size": size, "basis": basis}
    job.write_mark(job.folder.directions_mark, directions_fingerprint(job, digests, size), mark)
    return job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run."""
    job = make_job(tmp_path_factory.mktemp("amortised"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amortising, "score_shards", score_here)
        patch.setattr(amortising, "run_tasks", run_here)
        outside_ray(patch)
        summary.note_scores(job, score(job))
    return job


@pytest.fixture
def finished(made: Job, tmp_path: Path) -> Job:
    """A copy of it; its scores hold no path of the folder."""
    shutil.copytree(made.folder.root, tmp_path / "run")
    return Job(made.config.model_copy(update={"out": str(tmp_path / "run")}))


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.parquet"))}


def test_predictions_rank_as_the_mark_says_and_are_selected_alike(finished: Job) -> None:
    run = finished.folder
    table = open_scores(run).to_table()
    predicted = table.filter(table["predicted"])
    assert 100 < len(predicted) < 200
    assert table.filter(pc.invert(table["predicted"]))["score"].null_count == 0
    mark = storage.read_json(run.regressor_mark)
    last = mark["curve"][-1]
    measured = spearman(*(predicted[name].to_numpy().astype(float) for name in ("score", "similarity")))
    assert last["low"] - 0.02 < measured <= 1
    assert last["correlation"] > 0.9
    assert last["share"] == pytest.approx(0.4, abs=0.05)
    assert mark["pairs"] == PAIRS - len(predicted)
    assert storage.read_json(run.summary)["scores"]["predicted"]["correlation"] == last["correlation"]
    assert run_status(run.root).stages["score"]
    chosen = select(run, finished.config.select, seed=0)
    assert chosen.kept == 210
    kept = {uid for url in storage.list_files(f"{run.selection()}/keep") for uid in _column(url, "uid")}
    best = table.sort_by([("utility", "descending"), ("uid", "ascending")]).slice(0, 210)
    assert kept == set(best["uid"].to_pylist())
    assert 0 < pc.sum(best["predicted"]).as_py() < 210
    Path(run.summary).unlink()  # it has no counts before the selection is noted
    assert verify(run) == []


def _column(url: str, name: str) -> list[Any]:
    return list(pq.read_table(url, columns=[name])[name].to_pylist())


@pytest.mark.usefixtures("here")
def test_a_crash_at_any_point_ends_in_the_same_bytes(finished: Job) -> None:
    run = finished.folder
    sample = RunFolder(run.sample)
    whole, regressor = contents(run.scores), Path(run.regressor).read_bytes()
    # Killed in the second pass: one shard is left, and its sample was lost as well.
    for url in (run.score_mark(1), sample.score_mark(1), sample.score_file(1)):
        Path(url).unlink()
    score(finished)
    assert contents(run.scores) == whole
    # Killed in the first pass: before the fit, with one shard still to come.
    for url in (run.regressor, run.regressor_mark, sample.score_mark(2)):
        Path(url).unlink()
    shutil.rmtree(run.scores)
    status = run_status(run.root)
    assert (status.sampling, status.shards_done, status.stages["score"]) == (True, 2, False)
    score(finished)
    assert (contents(run.scores), Path(run.regressor).read_bytes()) == (whole, regressor)
    # Finished: the sample is not needed any more, and nothing is done again.
    shutil.rmtree(sample.scores)
    before = [mark.finished for mark in read_marks(run)]
    score(finished)
    assert [mark.finished for mark in read_marks(run)] == before
    assert not storage.list_files(sample.scores)
    Path(run.summary).unlink()
    assert verify(run) == []


@pytest.mark.usefixtures("here")
def test_other_settings_and_another_regressor_are_told(finished: Job) -> None:
    run = finished.folder
    other = finished.config.score.model_copy(update={"sample": 0.7})
    with pytest.raises(FingerprintError, match=r"sample: 0\.5 there, 0\.7 now"):
        score(Job(finished.config.model_copy(update={"score": other})))
    good = Path(run.regressor).read_bytes()
    Path(run.regressor).write_bytes(good + b"x")
    assert any("changed since it was committed" in problem for problem in verify(run))
    Path(run.regressor).unlink()
    assert any("missing, though its commit mark is there" in problem for problem in verify(run))
    mark = marks.read_mark(run.regressor_mark)
    assert mark is not None
    storage.write_json(run.regressor_mark, {**mark, "regressor": "other"})
    assert any("predicted with another regressor" in problem for problem in verify(run))


@pytest.mark.usefixtures("here")
def test_a_shard_without_a_sample_is_set_aside_and_taken_up_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, sample=0.6)
    broken = Path(job.inventory[1].url)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match="1 of 3 shards failed"):
        score(job)
    engine = job.config.engine.model_copy(update={"allowed_failures": 0.4})
    patient = Job(job.config.model_copy(update={"engine": engine}))
    outcome = score(patient)
    assert (outcome.done, [aside.item for aside in outcome.failed]) == (2, [1])
    assert [mark.shard for mark in read_marks(job.folder)] == [0, 2]
    assert verify(job.folder) == []
    broken.write_bytes(whole)
    outcome = score(patient, retry_failed=True)
    assert (outcome.done, outcome.failed) == (3, [])
    assert verify(job.folder) == []


@pytest.mark.usefixtures("here")
def test_what_cannot_be_predicted_is_refused_with_the_numbers(tmp_path: Path) -> None:
    job = make_job(tmp_path, estimator="random")
    with pytest.raises(
        StageError, match=r"predicted random scores have a rank correlation of -?0\.\d+ \(.*expected 0\.3"
    ):
        score(job)
    assert not storage.list_files(job.folder.scores)
    # The bar is no part of what decides the scores: lowered, the run goes on from the regressor that is there.
    low = job.config.score.model_copy(update={"min_correlation": 0.0})
    mark = storage.read_json(job.folder.regressor_mark)
    if mark["curve"][-1]["correlation"] >= 0:
        score(Job(job.config.model_copy(update={"score": low})))
        assert len(list(read_marks(job.folder))) == 3
    few = job.config.score.model_copy(update={"sample": 0.1})
    shutil.rmtree(job.folder.sample)
    shutil.rmtree(job.folder.scores, ignore_errors=True)
    with pytest.raises(StageError, match=r"expected at least 100 scored pairs to predict from, found \d+"):
        score(Job(job.config.model_copy(update={"score": few})))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_over_ray_the_files_are_those_of_one_process(made: Job, tmp_path: Path) -> None:
    assert amortising.score_shards is score_shards
    job = make_job(tmp_path, [info.url for info in made.inventory])
    outcome = score(job)
    assert (outcome.done, outcome.failed, outcome.statuses) == (3, [], {"ok": PAIRS})
    assert contents(job.folder.scores) == contents(made.folder.scores)
    assert Path(job.folder.regressor).read_bytes() == Path(made.folder.regressor).read_bytes()


@pytest.mark.usefixtures("here")
def test_a_sample_of_two_writers_is_made_anew_by_the_same_command(finished: Job, tmp_path: Path) -> None:
    """Two kinds of GPU give other last digits: the mark of one may lie over the file of the other."""
    run = finished.folder
    sample = RunFolder(run.sample)
    whole = contents(run.scores)
    file = Path(sample.score_file(1))
    bytes_of_one = file.read_bytes()
    file.write_bytes(bytes_of_one + b"0")
    Path(run.score_mark(1)).unlink()
    with pytest.raises(StageError, match=r"1 of 3 shards failed.*changed since it was committed"):
        score(finished)
    outcome = score(finished)
    assert (outcome.done, outcome.failed) == (3, [])
    assert (contents(run.scores), file.read_bytes()) == (whole, bytes_of_one)
    assert not storage.list_files(f"{run.root}/failed")


@pytest.mark.usefixtures("here")
def test_a_fit_that_broke_off_leaves_no_mark_over_its_regressor(finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished.folder
    engine = finished.config.engine.model_copy(update={"stale": "redo"})
    redo = finished.config.model_copy(update={"engine": engine})
    whole = Path(run.regressor).read_bytes()
    more = redo.score.model_copy(update={"sample": 0.6})
    with monkeypatch.context() as patch:
        patch.setattr(amortising, "score_shards", broken_off)
        with pytest.raises(KeyboardInterrupt):
            score(Job(redo.model_copy(update={"score": more})))
    assert run_status(run.root).sampling
    with monkeypatch.context() as patch:
        patch.setattr(Job, "write_mark", broken_off)
        with pytest.raises(KeyboardInterrupt):
            score(Job(redo.model_copy(update={"score": more})))
    assert Path(run.regressor).read_bytes() != whole
    assert marks.read_mark(run.regressor_mark) is None


def broken_off(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
