"""The select stage: which pairs are kept, decided outside the driver, since it reads the scores of all pairs."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.engine.connect import alive_nodes
from pipeline.engine.tasks import run_task
from pipeline.errors import StageError
from pipeline.selection.tasks import MapTasks
from pipeline.stages import summary
from pipeline.stages.job import Job
from pipeline.stages.mapping import ordered_map
from pipeline.store import storage
from pipeline.store.commits import read_marks

#: Score files from which on a selection is shared out over the machines of a cluster.
WORTH_OTHER_MACHINES = 256


def select_pairs(job: Job) -> None:
    """Write the selection, unless it was made from these scores with these settings, and note its counts.

    The passes over the score files run in the threads of one task; as tasks of their own where there are many files
    and other machines.
    """
    require_scores(job)
    if not summary.selection_is_current(job):
        if len(job.inventory) >= WORTH_OTHER_MACHINES and len(alive_nodes()) > 1:
            _select(job.config, ordered_map(job, "select", "parts", at_least=1))
        else:
            run_task(_select, job.config, stage="select", config=job.config.engine)
    summary.note_selection(job)


def require_scores(job: Job) -> None:
    """Every shard is scored, but for the share that may fail, which was set aside. Raises `StageError`."""
    done = {mark.shard for mark in read_marks(job.folder)}
    missing = [shard.index for shard in job.inventory if shard.index not in done]
    few = len(missing) <= job.config.engine.allowed_failures * len(job.inventory)
    if not few or not all(storage.exists(job.folder.failure_file(shard)) for shard in missing):
        raise StageError(
            f"{len(missing)} of {len(job.inventory)} shards have no scores: run `diffprune score CONFIG` first"
        )


def _select(config: Config, map_tasks: MapTasks | None = None) -> None:
    from pipeline.selection.select import select
    from pipeline.selection.tasks import thread_map

    select(Job(config).folder, config.select, seed=config.seed, map_tasks=map_tasks or thread_map)
