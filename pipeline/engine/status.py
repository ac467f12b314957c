"""How far a run is, read from its files alone, from any machine."""

from __future__ import annotations

import io
import time
from collections import Counter
from dataclasses import dataclass, field

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipeline.emit.emit import is_emitted
from pipeline.engine import lease
from pipeline.engine.failures import Aside, read_aside
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection.summary import begun_selections, summary_file
from pipeline.store import storage
from pipeline.store.commits import read_marks
from pipeline.store.pulse import read_pulse
from pipeline.text import plural, rough_duration

#: The rate is that of the shards committed in the last so many seconds before the newest one.
RATE_SECONDS = 600.0


@dataclass(frozen=True)
class RunStatus:
    """Numbers of a run. `pairs_per_second` and `seconds_left` are None while too little is committed to tell.

    `stages` says of each stage whether its last file is there, of `select` and `emit` that of any selection; one that
    was made again after it was handed over does not count as that.
    `inventoried` is False before the inventory, when totals are still unknown and 0. While `sampling` (the first pass
    of `score.sample`) the counts are that pass's. `driver` is which process takes inventory, trains or scores, and when
    it last said so; empty when none does, or none that left a file.
    """

    root: str
    stages: dict[str, bool]
    inventoried: bool = False
    sampling: bool = False
    shards: int = 0
    pairs: int = 0
    shards_done: int = 0
    pairs_done: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    failed: list[Aside] = field(default_factory=list)
    workers: int = 0
    pairs_per_second: float | None = None
    driver: str = ""

    @property
    def shards_left(self) -> int:
        """Shards neither committed nor set aside."""
        return self.shards - self.shards_done - len(self.failed)

    @property
    def rejected(self) -> int:
        """Pairs without a score in the shards that are done."""
        return sum(self.reasons.values())

    @property
    def seconds_left(self) -> float | None:
        """At the present rate."""
        if not self.pairs_per_second or not self.shards:
            return None
        return self.shards_left * (self.pairs / self.shards) / self.pairs_per_second


def run_status(root: str) -> RunStatus:
    """Read the status of the run in folder `root`. Raises `StageError` where there is no run."""
    run = RunFolder(root)
    files = {
        "inventory": run.inventory,
        "train": run.checkpoint_manifest,
        "directions": run.directions_mark,
        "report": run.report,
    }
    stages = {name: storage.exists(url) for name, url in files.items()}
    selections = [name for name in begun_selections(run) if storage.exists(summary_file(run, name))]
    stages["select"] = bool(selections)
    stages["emit"] = any(is_emitted(run, name) for name in selections)
    if not stages["inventory"]:
        if not storage.exists(run.config):
            raise StageError(f"{root}: expected a run's folder, found neither config.yaml nor inventory.parquet")
        return RunStatus(root, stages, driver=_driver(run))
    samples = pq.read_table(io.BytesIO(storage.read_bytes(run.inventory)), columns=["samples"])["samples"]

    # A sample without a regressor, beside scores, is one that was given up for scoring every pair.
    begun = [bool(storage.list_files(folder.scores, ".json")) for folder in (run, RunFolder(run.sample))]
    sampling = not storage.exists(run.regressor_mark) and begun == [False, True]
    here = RunFolder(run.sample) if sampling else run
    pairs_done = shards_done = 0
    reasons: Counter[str] = Counter()
    recent: list[tuple[float, int, str]] = []  # finished, pairs, worker; pruned as it grows
    newest = 0.0
    done: set[int] = set()
    for mark in read_marks(here):
        done.add(mark.shard)
        shards_done += 1
        pairs_done += mark.rows
        reasons.update(mark.reasons)
        newest = max(newest, mark.finished)
        recent.append((mark.finished, mark.rows, mark.worker))
        if len(recent) > 100_000:
            recent = [entry for entry in recent if entry[0] > newest - RATE_SECONDS]
    recent = [entry for entry in recent if entry[0] > newest - RATE_SECONDS]
    asides = (read_aside(url) for url in storage.list_files(storage.join(here.root, "failed"), ".json"))
    return RunStatus(
        root=root,
        stages={"inventory": True, **stages, "score": not sampling and shards_done == len(samples)},
        inventoried=True,
        sampling=sampling,
        shards=len(samples),
        pairs=int(pc.sum(samples).as_py() or 0),
        shards_done=shards_done,
        pairs_done=pairs_done,
        reasons=dict(sorted(reasons.items())),
        failed=[aside for aside in asides if aside is not None and aside.item not in done],
        workers=len({worker for _, _, worker in recent}),
        pairs_per_second=_rate([(finished, pairs) for finished, pairs, _ in recent]),
        driver=_driver(run),
    )


def _driver(run: RunFolder) -> str:
    found = read_pulse(run.driver)
    if found is None or not isinstance(found.get("time"), float):
        return ""
    silent = max(time.time() - found["time"], 0.0)
    return f"{lease.describe(found)}, last sign of life {rough_duration(silent)} ago"


def _rate(commits: list[tuple[float, int]]) -> float | None:
    """Pairs per second between the oldest and the newest commit; the oldest one's pairs were scored before."""
    if len(commits) < 2:
        return None
    commits = sorted(commits)
    seconds = commits[-1][0] - commits[0][0]
    return sum(pairs for _, pairs in commits[1:]) / seconds if seconds > 0 else None


def print_status(root: str) -> None:
    """Print `run_status` as a small table, and why shards failed."""
    status = run_status(root)
    console = Console(markup=False, emoji=False)  # paths may look like either
    table = Table(show_header=False, box=None, title=f"Run {root}", title_justify="left")
    for name in ("inventory", "train", "directions", "score", "select", "emit", "report"):
        table.add_row(name, "done" if status.stages.get(name) else "not finished")
    if status.driver:
        table.add_row("driver", status.driver)
    if status.sampling:
        table.add_row("", "the counts below are of the pass that scores the sample; the others are predicted after it")
    if status.inventoried:
        table.add_row(
            "shards", f"{status.shards_done:,} done, {len(status.failed):,} failed, {status.shards_left:,} left"
        )
        table.add_row("pairs", f"{status.pairs_done:,} of {status.pairs:,} done, {status.rejected:,} rejected")
        for reason, count in status.reasons.items():
            table.add_row("", f"{count:,} {reason}")
        if status.pairs_per_second is not None:
            table.add_row("rate", f"{status.pairs_per_second:,.0f} pairs/s on {plural(status.workers, 'worker')}")
        if status.seconds_left is not None and status.shards_left:
            table.add_row("time left", rough_duration(status.seconds_left))
    console.print(table)
    for aside in status.failed:
        console.print(f"failed: {aside}", markup=False, highlight=False, soft_wrap=True)
