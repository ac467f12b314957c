"""A run's record under `checkpoints/run-NNN/`: reading back what an exact replay needs."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import StageError
from pipeline.influence.optimizer import StepRule
from pipeline.models.checkpoint import decay_of_each, load_checkpoint
from pipeline.models.manifest import Manifest, ManifestEntry
from pipeline.replay.files import RecordFolder
from pipeline.replay.schedule import Rows, TrainingSettings
from pipeline.replay.train import Pairs, step_pairs
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.types import Checkpoint, PairBatch, Tree


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        folder: its files.
        settings: how it was trained.
        order: cache rows of every step, `[steps, batch_size]`.
        rates: learning rate that each step used, float64 `[steps]`.
        dataset_size: pairs it was trained on, `N` in Eq. 9.
        checkpoints: the recorded ones, by step.
        exact: whether training computed what `eval()` mode computes (no dropout, no batch statistics) in float32, so
            that a replay repeats it.
        losses: the batch's loss before each step, float64 `[steps]`.
    """

    folder: RecordFolder
    settings: TrainingSettings
    order: Rows
    rates: NDArray[np.float64]
    dataset_size: int
    checkpoints: tuple[ManifestEntry, ...]
    exact: bool
    losses: NDArray[np.float64]

    @staticmethod
    def read(folder: RunFolder, run: int = 0) -> Record:
        """Read the record of a finished run. Raises `StageError` where there is none."""
        files = RecordFolder.of(folder, run)
        if not storage.exists(files.mark):
            raise StageError(
                f"{files.root}: expected the record of a finished training run; `diffprune train CONFIG` makes it "
                "(checkpoints of other programs have none)"
            )
        mark = storage.read_json(files.mark)
        saved = storage.read_json(files.settings)
        settings = TrainingSettings(**saved["training"])
        return Record(
            folder=files,
            settings=settings,
            order=_read_array(files.order),
            rates=_read_array(files.rates),
            dataset_size=saved["dataset_size"],
            checkpoints=tuple(
                ManifestEntry(files.checkpoint(line["step"]), line["step"], line["lr"], run, settings.seed)
                for line in mark["checkpoints"]
            ),
            exact=saved["exact"],
            losses=np.asarray(mark["losses"], np.float64),
        )

    def initial(self, model: nn.Module | None = None) -> Checkpoint:
        """The weights before the first step, as a checkpoint of step 0 without optimizer state."""
        return load_checkpoint(self.folder.initial, model)

    def pairs(self, cache: Pairs, step: int) -> PairBatch:
        """The pairs of the step from `step` to `step + 1` (from 0), cropped as they were in training."""
        return step_pairs(cache, self.order, self.settings, step)


def step_rule(settings: TrainingSettings, params: Tree) -> StepRule:
    """The optimizer of a run, for `params`."""
    return StepRule(
        optimizer=settings.optimizer,
        weight_decay=decay_of_each(params, settings.weight_decay),
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        momentum=settings.momentum,
        grad_clip=settings.grad_clip,
    )


def trained_ids(folder: RunFolder, run: int) -> NDArray[np.int64]:
    """The ids (`PairBatch.ids`) of the pairs that run number `run` was trained on, ascending.

    Raises `StageError` where the run has no record of them.
    """
    url = RecordFolder.of(folder, run).trained
    if not storage.exists(url):
        raise StageError(
            f"{url}: expected the pairs that the run was trained on; `diffprune train CONFIG` records them"
        )
    return _read_array(url)


def write_plan(
    files: RecordFolder,
    settings: TrainingSettings,
    order: Rows,
    rates: NDArray[np.float64],
    trained: NDArray[np.int64],
    facts: dict[str, Any],
) -> None:
    """Write what is known before the first step; `trained` are ids of pairs, `facts` joins `settings.json`."""
    _write_array(files.trained, np.unique(trained))
    small = order.astype(np.int32) if order.max(initial=0) < 2**31 else order
    _write_array(files.order, small)
    _write_array(files.rates, rates)
    storage.write_json(files.settings, {"training": asdict(settings), **facts})


def write_manifest(folder: RunFolder, runs: int) -> Manifest | None:
    """Write `checkpoints/manifest.json` once the last of the runs is complete; None before that."""
    if not all(storage.exists(RecordFolder.of(folder, run).mark) for run in range(runs)):
        return None
    records = [Record.read(folder, run) for run in range(runs)]
    entries = tuple(entry for record in records for entry in record.checkpoints)
    manifest = Manifest(records[0].dataset_size, records[0].settings.optimizer, entries)
    manifest.write(folder.checkpoint_manifest)
    return manifest


def _write_array(url: str, array: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    storage.write_bytes(url, buffer.getvalue())


def _read_array(url: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    return array
