"""Where the files of a training run's record are, under `checkpoints/run-NNN/`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.run import RunFolder
from pipeline.store import storage


@dataclass(frozen=True)
class RecordFolder:
    """Paths of the files of one training run."""

    root: str

    @staticmethod
    def of(folder: RunFolder, run: int) -> RecordFolder:
        """The record of training run number `run`."""
        return RecordFolder(storage.join(folder.checkpoints, f"run-{run:03d}"))

    @property
    def initial(self) -> str:
        """The weights before the first step (a checkpoint file)."""
        return storage.join(self.root, "initial.safetensors")

    @property
    def order(self) -> str:
        """Cache rows of every step, `[steps, batch_size]` (npy)."""
        return storage.join(self.root, "order.npy")

    @property
    def trained(self) -> str:
        """The ids of the pairs that some step saw, int64, ascending (npy)."""
        return storage.join(self.root, "trained.npy")

    @property
    def rates(self) -> str:
        """Learning rate that each step used, float64 `[steps]` (npy)."""
        return storage.join(self.root, "rates.npy")

    @property
    def settings(self) -> str:
        """How the run was trained (JSON)."""
        return storage.join(self.root, "settings.json")

    @property
    def mark(self) -> str:
        """Written last: the run is complete (JSON, with its checkpoints and losses)."""
        return storage.join(self.root, "run.json")

    @property
    def progress(self) -> str:
        """How far the run is (JSON, renewed every few seconds)."""
        return storage.join(self.root, "progress.json")

    @property
    def failure(self) -> str:
        """Why the run stopped for good (JSON)."""
        return storage.join(self.root, "failed.json")

    @property
    def resume_mark(self) -> str:
        """Which resume point is whole, and the losses so far (JSON)."""
        return storage.join(self.root, "resume.json")

    def resume_point(self, step: int) -> str:
        """The state after `step` steps, to go on from."""
        return storage.join(self.root, f"resume-{step:08d}.safetensors")

    def checkpoint(self, step: int) -> str:
        """The recorded checkpoint after `step` steps."""
        return storage.join(self.root, f"step-{step:08d}.safetensors")
