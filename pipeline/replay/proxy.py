"""One proxy run from the first step to the last checkpoint: recorded, resumable at any moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint, serialise_checkpoint
from pipeline.models.clip import PairModel
from pipeline.replay.files import RecordFolder
from pipeline.replay.record import Record, write_manifest, write_plan
from pipeline.replay.schedule import TrainingSettings, data_order, recorded_steps, training_rows
from pipeline.replay.train import Pairs, Trainer
from pipeline.replay.workers import Alone, Workers
from pipeline.run import RunFolder
from pipeline.store import marks, storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.pulse import Pulse
from pipeline.tracking import Board
from pipeline.types import Checkpoint

#: Called after each step with the steps taken, the loss before the last of them and the rate that it used.
Progress = Callable[[int, float, float], None]


def train_proxy(
    config: Config,
    model_factory: Callable[[int], PairModel],
    cache: Pairs,
    folder: RunFolder,
    run: int = 0,
    *,
    identity: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Record:
    """Train one run and record it under `checkpoints/run-NNN/`; goes on where an earlier call stopped.

    A run that was killed and started again writes the same bytes as one that was not (on the same kind of machine,
    with the same number of threads). On a GPU that is not promised: its kernels may add up in another order each time.
    When the last of `proxy.runs` is complete, `checkpoints/manifest.json` is written.

    Args:
        config: its `proxy`, `reference.equal_captions`, `seed` and `engine.stale` are used.
        model_factory: the proxy at its initial weights, given the number of the run.
        cache: the decoded pairs, of which `proxy.subset` is drawn.
        folder: the run's folder.
        run: which of the `proxy.runs`.
        identity: what else decides the result and is not seen here, such as the inventory's fingerprint.
        device: where to train.
        workers: the processes that share each batch, this one included.
        progress: called by the first worker after each step.

    Raises `ConfigError` for settings that do not fit the pairs, `FingerprintError` when the folder holds a run with
    other settings (`engine.stale: refuse`), `StageError` when training diverges.
    """
    workers = workers or Alone()
    chosen = training_rows(np.arange(len(cache)), config.proxy.subset, config.seed, run)
    settings = TrainingSettings.of(config, len(chosen), run)
    if settings.batch_size % workers.size:
        raise ConfigError("expected a divisor of proxy.batch_size", key="proxy.workers", found=workers.size)
    recorded = recorded_steps(config, settings)
    trainer = Trainer(model_factory(run), cache, data_order(chosen, settings), settings, device, workers)
    files = RecordFolder.of(folder, run)
    initial = serialise_checkpoint(trainer.checkpoint())
    fingerprint = Fingerprint(
        {
            "training": asdict(settings),
            "checkpoints": recorded,
            "rows": storage.checksum(chosen.tobytes()),
            "initial": storage.checksum(initial),
            "workers": workers.size,
            "identity": dict(identity or {}),
        }
    )
    if not marks.is_current(files.mark, marks.read_mark(files.mark), fingerprint, config.engine.stale):
        session = _Session(trainer, files, fingerprint, recorded, config.proxy.resume_every)
        losses = session.resume(config.engine.stale)
        if workers.rank == 0 and trainer.step == 0:
            _remove_outdated(folder, files)
            storage.write_bytes(files.initial, initial)
            _write_plan(files, trainer, cache, len(chosen))
        tracked = nullcontext() if workers.rank else Board(folder, config, f"run-{run:03d}", trainer.step + 1)
        with tracked as board:
            session.train(losses, board, progress)
    workers.agree(0)  # Nobody reads the record before the first worker has written it.
    if workers.rank == 0:
        _remove_resume_points(files)
        write_manifest(folder, config.proxy.runs)
    return Record.read(folder, run)


class _Session:
    """The steps of one run between two interruptions."""

    def __init__(
        self, trainer: Trainer, files: RecordFolder, fingerprint: Fingerprint, recorded: list[int], resume_every: int
    ) -> None:
        self.trainer = trainer
        self.files = files
        self.fingerprint = fingerprint
        self.recorded = recorded
        self.resume_every = resume_every
        self.writes = trainer.workers.rank == 0
        self._pulse = Pulse(files.progress)

    def resume(self, stale: str) -> list[float]:
        """Restore the last whole resume point; the losses of the steps before it.

        The file may be gone though its mark is there: a worker that Ray lost sight of and replaced, and that goes on
        for a while, removes all points but its own.
        """
        mark = marks.read_mark(self.files.resume_mark)
        found = marks.is_current(self.files.resume_mark, mark, self.fingerprint, stale)
        there = found and mark is not None and storage.exists(self.files.resume_point(mark["step"]))
        step = self.trainer.workers.agree(mark["step"] if there and mark else 0)
        if not step:
            return []
        self.trainer.restore(load_checkpoint(self.files.resume_point(step), self.trainer.model))
        # Only the first worker needs the losses; a shared folder may show another machine its files a moment later.
        return list(mark["losses"]) if mark is not None else []

    def train(self, losses: list[float], board: Board | None, progress: Progress | None) -> None:
        """Take the steps that are left and commit the run."""
        trainer, steps = self.trainer, self.trainer.settings.steps
        with ThreadPoolExecutor(1) as thread:  # however the steps end, what it writes is written whole
            written: Future[None] | None = None
            while trainer.step < steps:
                losses.append(trainer.advance())
                step, rate = trainer.step, float(trainer.rates[trainer.step - 1])
                if not self.writes:
                    continue
                if step in self.recorded:
                    save_checkpoint(self.files.checkpoint(step), trainer.checkpoint())
                if step % self.resume_every == 0 and step < steps:
                    if written is not None:
                        written.result()
                    written = thread.submit(self._keep_resume_point, trainer.checkpoint(), losses.copy())
                if board is not None:
                    board.log(step, {"loss": losses[-1], "learning_rate": rate})
                state = {"step": step, "steps": steps, "loss": losses[-1], "lr": rate}
                self._pulse.beat(state, now=step == steps)
                if progress is not None:
                    progress(step, losses[-1], rate)
            if written is not None:
                written.result()
        if self.writes:
            self._commit(losses)

    def _keep_resume_point(self, checkpoint: Checkpoint, losses: list[float]) -> None:
        point = self.files.resume_point(checkpoint.step)
        save_checkpoint(point, checkpoint)
        marks.write_mark(self.files.resume_mark, self.fingerprint, {"step": checkpoint.step, "losses": losses})
        _remove_other_points(self.files, point)

    def _commit(self, losses: list[float]) -> None:
        rates = self.trainer.rates
        checkpoints = [{"step": step, "lr": float(rates[step - 1])} for step in self.recorded]
        marks.write_mark(self.files.mark, self.fingerprint, {"checkpoints": checkpoints, "losses": losses})


def _write_plan(files: RecordFolder, trainer: Trainer, cache: Pairs, dataset_size: int) -> None:
    settings = trainer.settings
    facts = {
        "dataset_size": dataset_size,
        "workers": trainer.workers.size,
        "exact": trainer.model.trains_as_it_evaluates and settings.precision == "fp32",
    }
    seen = np.unique(trainer.order)
    write_plan(files, settings, trainer.order, trainer.rates, cache.ids[seen], facts)


def _remove_resume_points(files: RecordFolder) -> None:
    """The run is complete, so that it goes on from none; also where a call that completed it was killed before this."""
    storage.remove(files.resume_mark)
    _remove_other_points(files)


def _remove_other_points(files: RecordFolder, keep: str = "") -> None:
    for url in storage.list_files(files.root, ".safetensors"):
        if storage.basename(url).startswith("resume-") and storage.basename(url) != storage.basename(keep):
            storage.remove(url)


def _remove_outdated(folder: RunFolder, files: RecordFolder) -> None:
    """Before a run starts anew: the marks of an earlier one first, then its checkpoints."""
    for mark in (folder.checkpoint_manifest, files.mark, files.resume_mark):
        storage.remove(mark)
    for url in storage.list_files(files.root, ".safetensors"):
        storage.remove(url)
