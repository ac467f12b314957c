"""The evaluate stage: models trained on what was kept and on baselines of the same size, at equal steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.sampling import Positions, offsets
from pipeline.engine.tasks import run_tasks
from pipeline.errors import ConfigError
from pipeline.evaluation.quality import Detection, detect, read_truth
from pipeline.evaluation.subsets import Result, train_and_measure
from pipeline.evaluation.zeroshot import load_held_out
from pipeline.selection.select import select
from pipeline.selection.summary import read_summary
from pipeline.selection.write import keep_file
from pipeline.stages.job import Job
from pipeline.stages.training import build_proxy, training_pairs
from pipeline.store import storage
from pipeline.store.commits import read_marks
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.task_marks import TaskMarks


@dataclass(frozen=True)
class _Training:
    """One model to train: its set, the positions it may see, and the seed."""

    config: Config
    set: str
    positions: Positions
    seed: int

    def __str__(self) -> str:
        return f"{self.set}, seed {self.seed}"


def evaluate(job: Job) -> list[Result]:
    """Train and measure every set, write `evaluation/results.json` and return its rows.

    Raises `ConfigError` without `evaluate.shards`, `StageError` before the selection is finished.
    """
    config = job.config
    if config.evaluate is None or config.evaluate.shards is None:
        raise ConfigError("expected shards to measure on", key="evaluate.shards")
    sets = list(_sets(job))
    trainings = [
        _Training(config, name, positions(seed) if callable(positions) else positions, seed)
        for name, positions in sets
        for seed in range(config.evaluate.seeds)
    ]
    values: dict[int, tuple[str, int, float]] = {}
    fingerprint = Fingerprint(
        {
            "evaluate": config.evaluate.model_dump(mode="json", exclude={"truth"}),
            "proxy": config.proxy.model_dump(mode="json"),
            "equal_captions": config.reference.equal_captions,
            "seed": config.seed,
            "inventory": job.inventory_digest,
            "sets": [[str(training), storage.checksum(training.positions.tobytes())] for training in trainings],
        }
    )
    folder = storage.join(job.folder.root, "evaluation")
    outcome = run_tasks(
        _train,
        trainings,
        run=job.folder,
        stage="evaluate",
        config=config.engine,
        on_result=lambda number, result: values.__setitem__(number, tuple(result)),
        marks=TaskMarks(storage.join(folder, "trainings"), fingerprint),
        unit="trainings",
        gpus=float(ray.cluster_resources().get("GPU", 0) > 0),  # type: ignore[no-untyped-call]
    )
    outcome.check("evaluate")
    results = []
    for name, _ in sets:
        mine = [values[number] for number, training in enumerate(trainings) if training.set == name]
        results.append(Result.of(name, mine[0][1], mine[0][0], [value for _, _, value in mine]))
    storage.write_json(
        storage.join(folder, "results.json"), {"rows": [_without_nan(asdict(result)) for result in results]}
    )
    return results


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _train(training: _Training) -> list[Any]:
    config = training.config
    assert config.evaluate is not None  # checked before any task
    assert config.evaluate.shards is not None
    job = Job(config)
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    pairs, _ = training_pairs(job)
    cache = pairs()
    rows = np.flatnonzero(np.isin(cache.positions, training.positions))
    held_out = load_held_out(config.evaluate.shards, job.decoder, config.data.caption, job.threads)
    device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
    value = train_and_measure(config, partial(build_proxy, config), cache, rows, held_out, training.seed, device)
    return [held_out.metric, len(rows), value]


def _sets(job: Job) -> Iterator[tuple[str, Any]]:
    """Name and positions of each set; for `random` a function of the seed, since each seed draws anew."""
    config = job.config
    assert config.evaluate is not None
    scored = _scored_positions(job)
    names = [config.select.name]
    if config.evaluate.keeps:
        names = [f"evaluate-{round(100 * keep)}" for keep in config.evaluate.keeps]
        for name, keep in zip(names, config.evaluate.keeps, strict=True):
            select(job.folder, config.select.model_copy(update={"name": name, "keep": keep}), seed=config.seed)
    for name in names:
        kept = kept_positions(job, name)
        share = f" {round(100 * len(kept) / len(scored))} %"
        yield f"kept{share}", kept
        if "random" in config.evaluate.baselines:

            def draw(seed: int, size: int = len(kept)) -> Positions:
                generator = np.random.default_rng([config.seed + Job.BASELINE_SEED, seed])
                return np.sort(generator.choice(scored, size, replace=False))

            yield f"random{share}", draw
        if "clip-score" in config.evaluate.baselines:
            similarity = score_column(job, "similarity")
            finite = np.where(np.isfinite(similarity), similarity, -np.inf)
            yield f"clip-score{share}", np.sort(np.argsort(-finite, kind="stable")[: len(kept)])
    if "full" in config.evaluate.baselines:
        yield "everything", scored


def kept_positions(job: Job, selection: str) -> Positions:
    """Global positions of the pairs that a selection keeps, sorted."""
    read_summary(job.folder, selection)
    folder = job.folder.selection(selection)
    parts = [np.empty(0, np.int64)]
    for start, shard in zip(offsets(job.inventory), job.inventory, strict=False):
        url = keep_file(folder, shard.index)
        if storage.exists(url):
            with storage.open_read(url) as handle:
                parts.append(pq.read_table(handle, columns=["index"])["index"].to_numpy().astype(np.int64) + start)
    return np.concatenate(parts)


def score_column(job: Job, name: str) -> NDArray[np.float64]:
    """A numeric column of the scores by global position, `[samples]`; NaN where there is no score."""
    values = np.full(job.samples, np.nan)
    starts = offsets(job.inventory)
    for mark in read_marks(job.folder):
        with storage.open_read(job.folder.score_file(mark.shard)) as handle:
            column = pc.cast(pq.read_table(handle, columns=[name])[name], "float64")
        start = starts[mark.shard]
        values[start : start + len(column)] = column.to_numpy(zero_copy_only=False)
    return values


def _scored_positions(job: Job) -> Positions:
    return np.flatnonzero(np.isfinite(score_column(job, "utility")))


@dataclass(frozen=True)
class Judgement:
    """How well a selection and its scores find the wrong captions of `evaluate.truth`.

    Attributes:
        by: the ranking by `utility` and, beside it, by `similarity`.
        pruned: pairs with a known truth that are not kept.
        wrong: how many of these have a wrong caption.
    """

    by: dict[str, Detection]
    pruned: int
    wrong: int


def judge(job: Job) -> Judgement | None:
    """Judge the selection and the scores; None where no truth is given."""
    config = job.config
    if config.evaluate is None or config.evaluate.truth is None:
        return None
    truth = read_truth(config.evaluate.truth)
    uids = _uids(job)
    known = np.array([uid in truth for uid in uids], dtype=bool)
    wrong = np.array([truth.get(uid, False) for uid in uids], dtype=bool)
    out = np.ones(job.samples, dtype=bool)
    out[kept_positions(job, config.select.name)] = False
    suspects = int(out.sum())
    by = {name: detect(score_column(job, name)[known], wrong[known], suspects) for name in ("utility", "similarity")}
    return Judgement(by, int((out & known).sum()), int((out & wrong).sum()))


def _uids(job: Job) -> list[str]:
    uids = [""] * job.samples
    starts = offsets(job.inventory)
    for mark in read_marks(job.folder):
        with storage.open_read(job.folder.score_file(mark.shard)) as handle:
            column = pq.read_table(handle, columns=["uid"])["uid"].to_pylist()
        uids[starts[mark.shard] : starts[mark.shard] + len(column)] = column
    return uids
