"""Runs the stages in order, or one of them; checks first what can be known to be wrong before any work.

This is the driver: it holds numbers, and loads neither torch nor what else computes. Tasks of Ray do that.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from pipeline.config import Config
from pipeline.emit.emit import emit
from pipeline.engine.connect import connect
from pipeline.engine.failures import check_writable
from pipeline.engine.lease import alone
from pipeline.engine.progress import say
from pipeline.engine.tasks import run_task
from pipeline.errors import ConfigError, FingerprintError, NoWorkerError
from pipeline.selection.summary import read_summary
from pipeline.stages import summary
from pipeline.stages.agreeing import say_other_scores, say_other_selection
from pipeline.stages.checks import check_ahead, check_given
from pipeline.stages.directions import compute_directions
from pipeline.stages.evaluating import evaluate
from pipeline.stages.inventory import take_inventory
from pipeline.stages.job import Job, demo_folder, open_job, uses_demo
from pipeline.stages.mapping import apart, ordered_map
from pipeline.stages.record import begin_record, record_config, say_other_versions
from pipeline.stages.scoring import score
from pipeline.stages.selecting import require_scores, select_pairs
from pipeline.stages.training import check_trained, require_checkpoints, train
from pipeline.stages.validating import validate
from pipeline.store import storage
from pipeline.text import plural

#: Stages up to the scores: what is chosen from these is checked before them, against the config alone.
_SCORING = ("inventory", "train", "directions", "score")

#: Stages that need none before them.
_TAKING_INVENTORY = ("inventory", "validate")

#: Stages that use the proxy, so that it is checked before them; for `score` complete directions vouch.
_WITH_PROXY = {"train", "directions", "evaluate", "validate"}
#: Stages that take the scores that are there.
_OF_SCORES = {"select", "emit", "report"}


def run_all(config: Config, *, retry_failed: bool = False) -> None:
    """All stages of a run; those that are complete are passed over. Ends with a table of what came out."""
    check_given(config)
    check_ahead(config)
    job = open_job(config)
    with connect(config.engine):
        _prepare(config, proxy=True)
        with _alone(job):
            begin_record(job)
            for stage in ("inventory", "train", "directions"):
                _run(job, stage)
            _score(job, retry_failed)
        for stage in ("select", "emit"):
            _run(job, stage)
        results = []
        if config.evaluate is not None and config.evaluate.shards is not None:
            with _stage(job, "evaluate"):
                results = evaluate(job)
        _run(job, "report")
    summary.show(job, results)


def run_stage(name: str, config: Config, *, retry_failed: bool = False) -> None:
    """One stage; refuses with a `StageError` when the stage before it has not finished."""
    check_given(config)
    if name in _SCORING:
        check_ahead(config)
    if name == "evaluate" and (config.evaluate is None or config.evaluate.shards is None):
        raise ConfigError("expected pairs to measure on, which nothing else has used", key="evaluate.shards")
    job = open_job(config)
    with connect(config.engine):
        _prepare(config, proxy=name in _WITH_PROXY)
        with _alone(job) if name in _SCORING else nullcontext():
            _run_one(job, name, retry_failed)


def _run_one(job: Job, name: str, retry_failed: bool) -> None:
    if name in _TAKING_INVENTORY:
        begin_record(job)
    if name == "directions":
        require_checkpoints(job)
    if name == "score":
        check_trained(job)
        try:
            _score(job, retry_failed)
        except (NoWorkerError, FingerprintError):
            _prepare(job.config, proxy=True)  # what is wrong may be the config's proxy
            raise
    elif name == "evaluate":
        require_scores(job)
        with _stage(job, "evaluate"):
            results = evaluate(job)
        summary.show(job, results)
    else:
        if name in _OF_SCORES:
            say_other_scores(job, name)
        _run(job, name)
        if name == "select":  # a whole run ends with them
            for line in summary.quality_lines(job):
                say(name, line)


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Up to the scores one driver works on a folder; several may choose from them at the same time."""
    with alone(job.folder.driver, lambda text: say("engine", text)):
        say_other_versions(job)
        yield


def _run(job: Job, stage: str) -> None:
    with _stage(job, stage):
        _STAGES[stage](job)
    record_config(job, stage)


def _score(job: Job, retry_failed: bool) -> None:
    with _stage(job, "score"):
        outcome = score(job, retry_failed=retry_failed)
    record_config(job, "score")
    summary.note_scores(job, outcome)


@contextmanager
def _stage(job: Job, name: str) -> Iterator[None]:
    """Time a stage; once it is complete, remove what killed writers left in the folders that it writes to."""
    with summary.timed(job, name):
        yield
        for folder in _folders(job, name):
            storage.remove_temporary(folder)
    storage.remove_temporary(job.folder.root, below=False)


def _folders(job: Job, stage: str) -> list[str]:
    """Where a stage and its tasks write, other than right in the run's folder."""
    root, selection = job.folder.root, job.folder.selection(job.config.select.name)
    own = {
        "inventory": [storage.join(root, "scratch"), storage.join(root, "places"), demo_folder(job.config)],
        "train": [job.folder.checkpoints, job.cache_folder],
        "directions": [job.folder.directions, job.cache_folder],
        "score": [job.folder.scores, job.folder.sample],
        "select": [selection],
        "emit": [selection],
        "evaluate": [storage.join(root, "evaluation"), job.cache_folder],
        "report": [storage.join(root, "report")],
        "validate": [storage.join(root, "validation")],
    }
    return [storage.join(root, "failed"), *own[stage]]


def _select(job: Job) -> None:
    select_pairs(job)
    chosen = read_summary(job.folder, job.config.select.name)
    say("select", f"{chosen.kept:,} of {chosen.total:,} pairs kept")


def _emit(job: Job) -> None:
    config = job.config
    say_other_selection(job, "emit")
    done = emit(
        job.folder,
        config,
        job.inventory,
        map_tasks=ordered_map(job, "emit", "shards"),
        apart=apart(job, "emit"),
        command=command_line(),
    )
    written = plural(done.tars, "tar") if config.emit.materialize else "keep lists"
    say("emit", f"{written} in {job.folder.selection(config.select.name)}")
    for warning in done.warnings:
        say("emit", warning)


def command_line() -> str:
    """The command that this process runs, as one would type it again; "" where another program uses the library."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    if os.path.basename(sys.argv[0]) == "diffprune":
        start = ["diffprune"]
    elif module.partition(".")[0] in ("pipeline", "jobs"):
        start = ["python", "-m", module]
    else:
        return ""
    return shlex.join([*start, *sys.argv[1:]])


def _report(job: Job) -> None:
    say_other_selection(job, "report")
    summary.speak_of_selection(job)
    say("report", run_task(_write_report, job.config, stage="report", config=job.config.engine))


def _write_report(config: Config) -> str:
    from pipeline.report.page import write_report

    return write_report(Job(config).folder, config, selection=config.select.name)


_STAGES: dict[str, Callable[[Job], None]] = {
    "inventory": take_inventory,
    "train": train,
    "directions": compute_directions,
    "select": _select,
    "emit": _emit,
    "report": _report,
    "validate": validate,
}


def _prepare(config: Config, *, proxy: bool) -> None:
    """Find by trying, before any work, what is wrong. Raises `ConfigError`, and `StageError` where the run's folder
    cannot be written to."""
    if proxy and (note := run_task(_check_proxy, config, stage="check", config=config.engine)):
        say("check", note)
    check_writable(config.out)
    if uses_demo(config):
        run_task(_make_demo, config, stage="demo", config=config.engine)


def _make_demo(config: Config) -> None:
    from pipeline.data.demo import make_demo

    make_demo(demo_folder(config), seed=config.seed)


def _check_proxy(config: Config) -> str:
    from pipeline.stages.computing import check_proxy

    return check_proxy(config)
