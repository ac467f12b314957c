"""How well scores and the selection find the captions that are known to be wrong (`evaluate.truth`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config, SelectConfig
from pipeline.engine.tasks import run_task
from pipeline.evaluation.quality import Detection, detect, match_truth
from pipeline.selection.kept import kept_positions, ranked_values
from pipeline.selection.summary import summary_file
from pipeline.selection.tasks import thread_map
from pipeline.stages.evaluation_sets import uids
from pipeline.stages.job import Job
from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint


@dataclass(frozen=True)
class Judgement:
    """How well a selection and rankings find the wrong captions of `evaluate.truth`.

    Attributes:
        by: the rankings, by name: `utility`, `similarity`, `select` (what the selection ranks by) and those of
            `evaluate.compare`; precision at the true number of wrong captions.
        pruned: pairs with a known truth that are not kept.
        wrong: how many of these have a wrong caption.
    """

    by: dict[str, Detection]
    pruned: int
    wrong: int


def judged_from(job: Job) -> str | None:
    """Digest of what decides a judgement: truth, finished selection and rankings; None where no truth is given."""
    config = job.config
    if config.evaluate is None or config.evaluate.truth is None:
        return None
    return Fingerprint(
        {
            "truth": storage.file_checksum(config.evaluate.truth),
            "selection": storage.file_checksum(summary_file(job.folder, config.select.name)),
            "select": config.select.model_dump(mode="json"),
            "compare": config.evaluate.compare,
        }
    ).digest


def judge(job: Job) -> Judgement | None:
    """Judge the selection and the rankings; None where no truth is given."""
    config = job.config
    if config.evaluate is None or config.evaluate.truth is None:
        return None
    return run_task(_judge, config, stage="judge", config=config.engine)


def _judge(config: Config) -> Judgement:
    """In a task, as it holds arrays over all pairs."""
    job = Job(config)
    known, wrong = _truth(job)
    out = np.ones(job.samples, dtype=bool)
    out[kept_positions(job.folder.selection(config.select.name), job.inventory)] = False
    return Judgement(_judge_rankings(job, known, wrong), int((out & known).sum()), int((out & wrong).sum()))


def judge_rankings(job: Job) -> dict[str, Detection]:
    """`Judgement.by` alone, for which no selection is needed; empty where no truth is given."""
    if job.config.evaluate is None or job.config.evaluate.truth is None:
        return {}
    return _judge_rankings(job, *_truth(job))


def _truth(job: Job) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pairs have a known truth, and which of these are wrong, bool `[pairs]` each."""
    assert job.config.evaluate is not None
    assert job.config.evaluate.truth is not None
    return match_truth(job.config.evaluate.truth, uids(job))


def _judge_rankings(job: Job, known: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> dict[str, Detection]:
    config = job.config
    assert config.evaluate is not None
    rankings: dict[str, dict[str, Any]] = {
        "utility": {"by": "utility"},
        "similarity": {"by": "similarity"},
        "select": {},
    }
    by = {}
    for name, changes in (rankings | config.evaluate.compare).items():
        plain = {"policy": "rank", "spread": None}
        select = SelectConfig.model_validate(config.select.model_dump() | changes | plain)
        values = ranked_values(job.folder, select, job.inventory, seed=config.seed, map_tasks=thread_map)
        by[name] = detect(values[known], wrong[known])
    return by
