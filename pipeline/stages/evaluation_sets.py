"""The sets that models are trained on to judge a selection: what it keeps, other choices, and baselines of its size.

They are arrays over all pairs, so they are made and read in tasks, and the driver knows files.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.arrays import Float64
from pipeline.config import Config, SelectConfig
from pipeline.data.positions import Positions, offsets
from pipeline.evaluation.quality import match_truth
from pipeline.selection.kept import chosen_positions, kept_positions
from pipeline.selection.summary import read_summary
from pipeline.selection.tasks import thread_map
from pipeline.stages.job import Job
from pipeline.store import storage
from pipeline.store.commits import read_marks


@dataclass(frozen=True)
class TrainingSet:
    """A set of pairs that models are trained on.

    Attributes:
        series: what chose it, the same for all sizes.
        name: the series and, where it is a choice, the share.
        share: of the scored pairs that models may be trained on, what a choice keeps; None for sets of their own size.
        positions: global positions of its pairs by the number of the seed (only `random` draws anew for each).
    """

    series: str
    name: str
    share: float | None
    positions: Callable[[int], Positions]


@dataclass(frozen=True)
class WrittenSet:
    """A training set for one seed, as numbers that the driver may hold.

    Attributes:
        series, name, share: as in `TrainingSet`.
        seed: number of the seed.
        file: where the positions are (npy).
        checksum: of the positions.
    """

    series: str
    name: str
    share: float | None
    seed: int
    file: str
    checksum: str


def write_sets(config: Config) -> list[WrittenSet]:
    """Write the positions of every set for every seed; sets of equal pairs share a file."""
    assert config.evaluate is not None  # checked before any task
    job = Job(config)
    written = []
    for each in training_sets(job):
        for seed in range(config.evaluate.seeds):
            positions = each.positions(seed)
            checksum = storage.checksum(positions.tobytes())
            file = storage.join(job.folder.root, "evaluation", "sets", f"{checksum}.npy")
            if not storage.exists(file):
                buffer = io.BytesIO()
                np.save(buffer, positions, allow_pickle=False)
                storage.write_bytes(file, buffer.getvalue())
            written.append(WrittenSet(each.series, each.name, each.share, seed, file, checksum))
    return written


def training_sets(job: Job) -> Iterator[TrainingSet]:
    """Every set that `evaluate` asks for, smaller shares first, then those without a share.

    The pairs held out as the target are in none of them: the others were chosen to help these.
    """
    config = job.config
    assert config.evaluate is not None
    baselines = config.evaluate.baselines
    scored = np.setdiff1d(np.flatnonzero(np.isfinite(score_column(job, "utility"))), job.held_out_positions)
    for ours in _ours(job):
        share = len(ours) / len(scored)

        def of(series: str, positions: Callable[[int], Positions], share: float = share) -> TrainingSet:
            return TrainingSet(series, f"{series} {round(100 * share)} %", share, positions)

        yield of("kept", partial(_always, ours))
        same_size: dict[str, object] = {"keep": len(ours)}
        if "clip-score" in baselines:
            plain: dict[str, object] = {"by": "similarity", "policy": "rank", "spread": None}
            yield of("clip-score", partial(_always, _choose(job, same_size | plain)))
        for name, changes in config.evaluate.compare.items():
            yield of(name, partial(_always, _choose(job, same_size | changes)))
        if "random" in baselines:
            yield of("random", partial(_drawn, scored, len(ours), config.seed + Job.BASELINE_SEED))
    if "right-only" in baselines:
        yield TrainingSet("right-only", "only right captions", None, partial(_always, _right(job, scored)))
    if "full" in baselines:
        yield TrainingSet("full", "everything", None, partial(_always, scored))


def _ours(job: Job) -> Iterator[Positions]:
    """What the selection keeps: at its own size, or at each of `evaluate.keeps`."""
    config = job.config
    assert config.evaluate is not None
    read_summary(job.folder, config.select.name)
    if config.evaluate.keeps is None:
        kept = kept_positions(job.folder.selection(config.select.name), job.inventory)
        yield np.setdiff1d(kept, job.held_out_positions)
        return
    for keep in sorted(config.evaluate.keeps):
        yield _choose(job, {"keep": keep})


def _choose(job: Job, changes: dict[str, object]) -> Positions:
    """What the selection would keep with some of its keys changed, and without the target held out."""
    changed = job.config.select.model_dump() | changes
    select = SelectConfig.model_validate(changed)
    return chosen_positions(
        job.folder,
        select,
        job.inventory,
        seed=job.config.seed,
        map_tasks=thread_map,
        without=job.held_out_positions,
    )


def _always(positions: Positions, seed: int) -> Positions:
    del seed
    return positions


def _drawn(scored: Positions, size: int, first: int, seed: int) -> Positions:
    return np.sort(np.random.default_rng([first, seed]).choice(scored, size, replace=False))


def _right(job: Job, scored: Positions) -> Positions:
    """The scored pairs whose caption is known to be right."""
    assert job.config.evaluate is not None
    assert job.config.evaluate.truth is not None  # the config asks for it
    known, wrong = match_truth(job.config.evaluate.truth, uids(job))
    return np.asarray(scored[(known & ~wrong)[scored]], np.int64)


def score_column(job: Job, name: str) -> Float64:
    """A numeric column of the scores by global position, `[samples]`; NaN where there is no score."""
    values = np.full(job.samples, np.nan)
    starts = offsets(job.inventory)
    for mark in read_marks(job.folder):
        with storage.open_read(job.folder.score_file(mark.shard)) as handle:
            column = pc.cast(pq.read_table(handle, columns=[name])[name], "float64")
        start = starts[mark.shard]
        values[start : start + len(column)] = column.to_numpy(zero_copy_only=False)
    return values


def uids(job: Job) -> list[str]:
    """The uid of every sample by global position; empty where there is no score file."""
    found = [""] * job.samples
    starts = offsets(job.inventory)
    for mark in read_marks(job.folder):
        with storage.open_read(job.folder.score_file(mark.shard)) as handle:
            column = pq.read_table(handle, columns=["uid"])["uid"].to_pylist()
        found[starts[mark.shard] : starts[mark.shard] + len(column)] = column
    return found
