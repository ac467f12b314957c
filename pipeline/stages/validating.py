"""The validate stage: has small runs retrained without pairs, and compares what every estimator predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from pipeline.engine.tasks import run_task, run_tasks
from pipeline.errors import ConfigError
from pipeline.patience import Patience
from pipeline.stages.inventory import take_inventory
from pipeline.stages.job import Job
from pipeline.stages.training import model_files
from pipeline.stages.versions import shard_versions
from pipeline.store import ahead, storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.pulse import read_pulse, share_done
from pipeline.store.task_marks import TaskMarks

#: Parts of a config that change nothing about a seed's run and its counterfactuals.
_OF_NO_SEED: dict[str, Any] = {
    **dict.fromkeys(("out", "engine", "select", "emit", "track", "report"), True),
    "validation": {"seeds"},
}


@dataclass(frozen=True)
class _Seed:
    """One run with all its counterfactuals."""

    config: Config
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}"

    @property
    def pulse(self) -> str:
        """How far it is, while it goes on."""
        return storage.join(self.config.out, "validation", "progress", f"{self.seed:05d}.json")


@dataclass(frozen=True)
class _Results:
    """What came of all seeds, and where it is written to."""

    folder: str
    config: Config
    seeds: list[dict[str, Any]]


def validate(job: Job) -> None:
    """Write `validation/`: `results.parquet` (every predicted and true effect), `table.json`, `validation.svg`.

    A seed that is done is not repeated: seeds may be added later.
    Raises `ConfigError` when the data hold fewer pairs than the small run and its target need.
    """
    take_inventory(job)
    config = job.config
    needed = config.validation.pairs + (config.validation.warm_pairs if config.validation.warm_steps else 0)
    free = job.samples - len(job.held_out_positions)
    if needed > free:
        raise ConfigError(
            f"expected at most the {free} pairs there are, those of validation.warm_pairs included",
            key="validation.pairs",
            found=needed,
        )
    folder = storage.join(job.folder.root, "validation")
    found: dict[int, dict[str, Any]] = {}
    decides = config.model_dump(mode="json", exclude=_OF_NO_SEED)
    truth = config.evaluate.truth if config.evaluate is not None else None
    fingerprint = Fingerprint(
        {
            "config": decides,
            "inventory": job.inventory_digest,
            **model_files(config),
            "target": shard_versions(config.target.shards, "target.shards", "validate", config.engine),
            "truth": storage.file_checksum(truth) if truth else "",
        }
    )
    seeds = [_Seed(config, seed) for seed in range(config.validation.seeds)]
    # What seeds that were interrupted said of themselves is not true of a new start.
    ahead.each(storage.remove, [seed.pulse for seed in seeds])
    outcome = run_tasks(
        _measure,
        seeds,
        run=job.folder,
        stage="validate",
        config=config.engine,
        on_result=found.__setitem__,
        marks=TaskMarks(storage.join(folder, "seeds"), fingerprint),
        unit="seeds",
        patience=Patience.of_computing(config.engine.task_timeout),
        pulse=lambda seed: read_pulse(seed.pulse),
        begun=share_done,
    )
    outcome.check("validate")
    results = _Results(folder, config, [found[seed] for seed in range(config.validation.seeds)])
    console = Console()
    for table in run_task(_write, results, stage="validate", config=config.engine):
        console.print(table)


def _measure(item: _Seed) -> dict[str, Any]:
    from pipeline.stages.measuring import measure

    return measure(item.config, item.seed, item.pulse)


def _write(results: _Results) -> list[Table | str]:
    from pipeline.stages.measuring import write_results

    return write_results(results.folder, results.config, results.seeds)
