"""A job over the real engine with a fake scorer: a stage of tasks, then a stage of shards, both resumable.

`python -m tests.faults.cheap_job --out DIR` ends with status 0 when everything is there.
"""

from __future__ import annotations

import argparse
import sys
import time

from pipeline.config import EngineConfig
from pipeline.engine.connect import connect
from pipeline.engine.scoring import score_shards
from pipeline.engine.tasks import run_tasks
from pipeline.errors import DiffpruneError
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.task_marks import TaskMarks
from tests.engine.fakes import FINGERPRINT, FakeSpec, shard_infos


def slow_square(number: int) -> int:
    """A task of a twentieth of a second."""
    time.sleep(0.05)
    return number * number


def work(out: str, shards: int, seconds: float, retries: int, script: str) -> None:
    """Both stages, each picking up what is there."""
    run = RunFolder(out)
    config = EngineConfig(cpus_per_worker=1, retries=retries, retry_wait=0.1)
    results: dict[int, int] = {}
    with connect(config):
        run_tasks(
            slow_square,
            range(shards // 2),
            run=run,
            stage="squares",
            config=config,
            on_result=results.__setitem__,
            marks=TaskMarks(storage.join(out, "squares"), Fingerprint({"count": shards // 2})),
        ).check("squares")
        storage.write_json(storage.join(out, "squares.json"), [results[number] for number in sorted(results)])
        infos = shard_infos(shards)
        outcome = score_shards(FakeSpec(run, script=script, seconds=seconds), infos, run, FINGERPRINT, config)
        outcome.check(0.0, storage.join(out, "failed"))
    storage.write_json(run.summary, {"shards": outcome.done, "statuses": dict(sorted(outcome.statuses.items()))})


def main() -> int:
    """Parse the command line and run the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shards", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--retries", type=int, default=20)
    parser.add_argument("--script", default="", help="folder with the fake scorer's troubles and its log")
    options = parser.parse_args()
    try:
        work(options.out, options.shards, options.seconds, options.retries, options.script)
    except DiffpruneError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
