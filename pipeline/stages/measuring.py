"""What a validation computes in its tasks: retraining without pairs, and what every estimator predicts."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table

from pipeline.allocator import keep_freed_memory
from pipeline.arrays import Bool
from pipeline.config import Config, ValidateConfig
from pipeline.data.decode import uid_to_id
from pipeline.data.sampling import load_pairs
from pipeline.evaluation.agreement import Measured, between_seeds, raw_rows, table
from pipeline.evaluation.by_runs import by_runs
from pipeline.evaluation.cleaning import losses_without, suspects, with_swapped_captions
from pipeline.evaluation.deletion import deletions, random_deletions
from pipeline.evaluation.estimates import RunEstimator, forms_of, reference_of
from pipeline.evaluation.lds import outcomes, random_halves
from pipeline.evaluation.leave_one_out import left_out_changes, left_out_pairs
from pipeline.evaluation.quality import Detection, detect, read_truth
from pipeline.evaluation.small_run import small_run
from pipeline.evaluation.steepness import stability_limit, steepness
from pipeline.evaluation.validation_plot import plot
from pipeline.prepared import settings_of
from pipeline.replay.schedule import TrainingSettings, recorded_steps
from pipeline.stages.computing import ComputingJob
from pipeline.stages.job import OVERDRAW
from pipeline.stages.plans import draw_batches
from pipeline.stages.validation_tables import tables
from pipeline.store import storage
from pipeline.store.pulse import Pulse
from pipeline.types import PairBatch

#: Offset of the seed that draws the pairs of the small runs.
PAIRS_SEED = 106

#: Share of the pairs in a deletion.
DELETED = 0.1


class _Pairs:
    """The pairs of all seeds: drawn and decoded alike in every task."""

    def __init__(self, job: ComputingJob) -> None:
        self.job = job
        self.sizes = job.config.validation

    @cached_property
    def drawn(self) -> PairBatch:
        """Pairs of the small run, then those of the warm-up."""
        count = self.sizes.pairs + (self.sizes.warm_pairs if self.sizes.warm_steps else 0)
        job = self.job
        positions = job.draw(int(count * OVERDRAW) + 16, PAIRS_SEED, job.held_out_positions)
        caption, places = job.config.data.caption, job.folder.places
        return load_pairs(job.inventory, positions, job.decoder, caption, job.threads, places=places)[0]

    @property
    def others(self) -> PairBatch | None:
        """Pairs of the warm-up, or None where there is none."""
        sizes = self.sizes
        return self.drawn[sizes.pairs : sizes.pairs + sizes.warm_pairs] if sizes.warm_steps else None

    @cached_property
    def data(self) -> tuple[PairBatch, Bool | None]:
        """The pairs of the small run, and which of them are known to be wrong (None where nothing is known)."""
        config = self.job.config
        data = self.drawn[: self.sizes.pairs]
        if self.sizes.swapped:
            return with_swapped_captions(data, self.sizes.swapped, config.seed)
        if config.evaluate is None or config.evaluate.truth is None:
            return data, None
        truth = {uid_to_id(uid): wrong for uid, wrong in read_truth(config.evaluate.truth).items()}
        return data, np.array([truth.get(number, False) for number in data.ids.tolist()], dtype=bool)


class _Progress:
    """How much of a seed is done, in trainings, for the driver to read. All estimates together count as half of them:
    replays go through a run several times, while trainings are stacked."""

    def __init__(self, url: str, estimates: int, trainings: int) -> None:
        self._pulse = Pulse(url)
        self._all = 1.5 * trainings
        self._per_estimate = 0.5 * trainings / max(estimates, 1)
        self._done = 0.0

    def estimated(self) -> None:
        """One more estimate is there."""
        self.trained(self._per_estimate)

    def trained(self, count: float) -> None:
        """So many more trainings are done."""
        self._done += count
        self._pulse.beat({"step": self._done, "steps": self._all})

    def end(self) -> None:
        """Nothing is left to follow."""
        self._pulse.end()


def measure(config: Config, seed: int, pulse_file: str) -> dict[str, Any]:
    """Everything of one seed, as plain numbers; `pulse_file` says how far it is, while it goes on."""
    sizes = config.validation
    job = ComputingJob(config)
    torch.set_num_threads(1)
    keep_freed_memory()
    pairs = _Pairs(job)
    (data, wrong), target = pairs.data, draw_batches(job).target
    n = len(data)
    run = small_run(config, job.model(seed), data, target, seed, pairs.others)
    recorded = _recorded(config, n)
    reference = reference_of(run.data, config.reference.pairs, config.seed)
    settings = settings_of(config)
    estimator = RunEstimator(run, recorded, reference)
    forms = forms_of(sizes.estimators, settings)
    progress = _Progress(pulse_file, len(forms), _trainings(sizes, n, len(forms), wrong))
    estimates = {}
    for form in forms:
        estimates[form.name] = estimator.estimate(form)
        progress.estimated()
    fast = small_run(config, job.model(seed), data, target, seed, pairs.others, dtype=torch.float32)
    run.on_trained = fast.on_trained = progress.trained
    rows = left_out_pairs(n, sizes.leave_out, config.seed)
    result: dict[str, Any] = {
        "utilities": {name: found.utilities.tolist() for name, found in estimates.items()},
        "costs": {name: [found.directions, found.scoring] for name, found in estimates.items()},
        "changes": left_out_changes(run, rows).tolist(),
        "outcomes": outcomes(fast, random_halves(n, sizes.halves, config.seed)).tolist(),
        "pairs": n,
        "steepness": steepness(run, settings),
        "stability_limit": stability_limit(run),
        "losses": [float(run.target_losses({k: v[None] for k, v in run.states[at].params.items()})) for at in (0, -1)],
    }
    if sizes.partial is not None:
        result["partial"] = left_out_changes(run, rows, sizes.partial).tolist()
    if sizes.deletions:
        sets = random_deletions(n, sizes.deletions + 1, DELETED, config.seed)
        result["deletions"] = [asdict(found) for found in deletions(run, recorded, settings, sets)]
    if wrong is not None and wrong.any():
        count = int(wrong.sum())
        chance = suspects(np.random.default_rng([config.seed, seed]).random(n), count)
        removed = [np.zeros(n, dtype=bool), wrong, chance]
        removed += [suspects(found.utilities, count) for found in estimates.values()]
        names = ["(nothing)", "(known wrong)", "(random)", *estimates]
        result["wrong"] = wrong.tolist()
        result["cleaned"] = dict(zip(names, losses_without(fast, removed).tolist(), strict=True))
    progress.end()
    return result


def _trainings(sizes: ValidateConfig, pairs: int, forms: int, wrong: Bool | None) -> int:
    """Trainings of a seed beside its own run."""
    left_out = min(sizes.leave_out, pairs) + 1
    without = left_out * (1 if sizes.partial is None else 2) + sizes.halves
    deleted = sizes.deletions + 1 if sizes.deletions else 0
    cleaned = 3 + forms if wrong is not None and wrong.any() else 0
    return without + deleted + cleaned


def _recorded(config: Config, pairs: int) -> list[int]:
    sizes = config.validation
    even = {"checkpoint_at": "even", "steps": sizes.steps, "batch_size": min(config.proxy.batch_size, pairs)}
    sized = config.model_copy(update={"proxy": config.proxy.model_copy(update=even)})
    return recorded_steps(sized, TrainingSettings.of(sized, pairs))


def write_results(folder: str, config: Config, seeds: list[dict[str, Any]]) -> list[Table | str]:
    """Write what all seeds together say; the tables to print."""
    n = seeds[0]["pairs"]
    sizes = config.validation
    measured = Measured(
        utilities={name: np.array([seed["utilities"][name] for seed in seeds]) for name in seeds[0]["utilities"]},
        costs={name: (cost[0], cost[1]) for name, cost in seeds[0]["costs"].items()},
        rows=left_out_pairs(n, sizes.leave_out, config.seed),
        changes=np.array([seed["changes"] for seed in seeds]),
        halves=random_halves(n, sizes.halves, config.seed),
        outcomes=np.array([seed["outcomes"] for seed in seeds]),
        partial=None if sizes.partial is None else np.array([seed["partial"] for seed in seeds]),
    )
    lines = table(measured)
    wrong = np.array(seeds[0]["wrong"], dtype=bool) if "wrong" in seeds[0] else None
    runs = list(by_runs(measured, wrong)) if len(seeds) > 1 else []
    rows = list(raw_rows(measured))
    for number, seed in enumerate(seeds):
        for item, found in enumerate(seed.get("deletions", [])):
            rows.append({"measure": "deletion", "estimator": found["method"], "seed": number, "item": item}
                        | {key: found[key] for key in ("predicted", "true", "distance")})  # fmt: skip
        for name, loss in seed.get("cleaned", {}).items():
            rows.append({"measure": "cleaned", "estimator": name, "seed": number, "item": 0, "true": loss})
    cleaning = _cleaning(measured, wrong)
    with storage.atomic_writer(storage.join(folder, "results.parquet")) as handle:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), handle, compression="zstd")
    storage.write_json(
        storage.join(folder, "table.json"),
        {
            "lines": [storage.without_nan(asdict(line)) for line in lines],
            "runs": [storage.without_nan(asdict(line)) for line in runs],
            "cleaning": storage.without_nan({name: found.to_dict() for name, found in cleaning.items()}),
            "target_loss": [seed["losses"] for seed in seeds],
            "eta_lambda_max": [seed["steepness"] for seed in seeds],
            "stability_limit": seeds[0]["stability_limit"],
            **storage.without_nan({"outcomes_between_seeds": between_seeds(measured.outcomes)}),
        },
    )
    storage.write_bytes(storage.join(folder, "validation.svg"), plot(lines, runs))
    return tables(lines, runs, cleaning, seeds)


_SCHEMA = pa.schema(
    [
        ("measure", pa.string()),
        ("estimator", pa.string()),
        ("seed", pa.int32()),
        ("item", pa.int32()),
        ("predicted", pa.float64()),
        ("true", pa.float64()),
        ("distance", pa.float64()),
    ]
)


def _cleaning(measured: Measured, wrong: Bool | None) -> dict[str, Detection]:
    """How well low utility (mean over the runs) finds the wrong pairs, precision at their true number."""
    if wrong is None:
        return {}
    return {name: detect(values.mean(0), wrong) for name, values in measured.utilities.items()}
