"""Making a selection from finished scores: plan it, write the keep lists, commit the summary last."""

from __future__ import annotations

import time

from pipeline.config import SelectConfig
from pipeline.run import RunFolder
from pipeline.selection import layers
from pipeline.selection.plan import plan_selection
from pipeline.selection.prepare import Progress
from pipeline.selection.summary import SelectionSummary, summarise, summary_file, write_summary
from pipeline.selection.tasks import MapTasks
from pipeline.selection.write import carry_out, keep_file
from pipeline.store import storage


def select(
    run: RunFolder,
    config: SelectConfig,
    *,
    seed: int,
    dry_run: bool = False,
    progress: Progress | None = None,
    map_tasks: MapTasks = map,
) -> SelectionSummary:
    """Choose the pairs of a run that are kept, and write `keep/NNNNN.parquet` and `selection.json`.

    Nothing is scored again; selections of other names are left alone. `dry_run` writes no result. `progress` is
    called with the name of each pass; `map_tasks(function, items)` may run the tasks of a pass anywhere, results in
    order. What is kept depends on the scores, the config and `seed` alone, not on how the tasks were run.

    Raises `ConfigError`, `StageError` and `InputError` as `plan_selection` does.
    """
    folder = "" if dry_run else run.selection(config.name)
    scratch = storage.join(run.root, "scratch", f"select-{config.name}{'-dry' if dry_run else ''}")
    clock = _Clock(progress)
    layers.remove_all(scratch)
    try:
        plan = plan_selection(run, config, seed=seed, scratch=scratch, progress=clock, map_tasks=map_tasks)
        clock("accounting" if dry_run else "writing keep lists")
        if folder:
            storage.remove(summary_file(run, config.name))
        account = carry_out(plan, folder or None, map_tasks)
    finally:
        layers.remove_all(scratch)
    summary = summarise(plan, account, config, folder, clock.stop())
    if folder:
        current = {keep_file(folder, shard.shard) for shard in account.shards}
        for url in storage.list_files(storage.join(folder, "keep"), ".parquet"):
            if url not in current:
                storage.remove(url)
        write_summary(summary_file(run, config.name), summary)
    return summary


class _Clock:
    """Passes names of passes on and notes how long each takes."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.current = ""
        self.since = time.perf_counter()

    def __call__(self, name: str) -> None:
        self.stop()
        self.current = name
        if self.progress is not None:
            self.progress(name)

    def stop(self) -> dict[str, float]:
        """End the current pass; the seconds of all so far."""
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.since
        self.current, self.since = "", now
        return self.seconds
