"""The list of a run's checkpoints, `checkpoints/manifest.json`. Loads torch only when a checkpoint is opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.store import storage

if TYPE_CHECKING:
    from torch import nn

    from pipeline.types import Checkpoint


@dataclass(frozen=True)
class ManifestEntry:
    """One recorded checkpoint.

    Attributes:
        path: the file, a path or URL.
        step: optimizer steps so far.
        lr: rate of the last of them.
        run: the proxy run it belongs to, from 0.
        seed: seed of that run's data order; None for checkpoints of other programs.
    """

    path: str
    step: int
    lr: float
    run: int = 0
    seed: int | None = None

    def load(self, model: nn.Module | None = None) -> Checkpoint:
        """The checkpoint, with step, rate and run as listed here."""
        from pipeline.models.checkpoint import load_checkpoint

        return load_checkpoint(self.path, model, step=self.step, lr=self.lr, run=self.run)


@dataclass(frozen=True)
class Manifest:
    """All recorded checkpoints, by run and step.

    Attributes:
        dataset_size: training pairs of a run, `N` in Eq. 9.
        optimizer: `adamw` or `sgd`.
        checkpoints: by run, then by step.
    """

    dataset_size: int
    optimizer: str
    checkpoints: tuple[ManifestEntry, ...]

    @property
    def runs(self) -> list[int]:
        """Numbers of the runs, in order."""
        return sorted({entry.run for entry in self.checkpoints})

    def of_run(self, run: int) -> list[ManifestEntry]:
        """The checkpoints of one run, by step."""
        return [entry for entry in self.checkpoints if entry.run == run]

    def write(self, url: str) -> None:
        """Write atomically; paths below the manifest's folder become relative to it."""
        folder = url.rpartition("/")[0] + "/"
        entries: list[dict[str, Any]] = []
        for entry in self.checkpoints:
            path = entry.path.removeprefix(folder) if folder != "/" else entry.path
            line: dict[str, Any] = {"path": path, "step": entry.step, "lr": entry.lr, "run": entry.run}
            entries.append(line if entry.seed is None else line | {"seed": entry.seed})
        value = {"dataset_size": self.dataset_size, "optimizer": self.optimizer, "checkpoints": entries}
        storage.write_json(url, value)

    @staticmethod
    def read(url: str) -> Manifest:
        """Read a manifest; relative paths are below its folder. Raises `InputError`."""
        try:
            value = storage.read_json(url)
        except (OSError, ValueError) as error:
            raise InputError(f"{url}: expected a checkpoint manifest (JSON): {error}") from None
        folder = url.rpartition("/")[0]
        try:
            entries = [
                ManifestEntry(
                    path=_absolute(folder, line["path"]),
                    step=int(line["step"]),
                    lr=float(line["lr"]),
                    run=int(line.get("run", 0)),
                    seed=line.get("seed"),
                )
                for line in value["checkpoints"]
            ]
            manifest = Manifest(int(value["dataset_size"]), str(value["optimizer"]), by_run_and_step(entries))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{url}: expected dataset_size, optimizer and checkpoints, each with path, step and lr: "
                f"{type(error).__name__}: {error}"
            ) from None
        if not manifest.checkpoints:
            raise InputError(f"{url}: expected at least one checkpoint, found none")
        return manifest


def by_run_and_step(entries: Iterable[ManifestEntry]) -> tuple[ManifestEntry, ...]:
    """The order of a manifest."""
    return tuple(sorted(entries, key=lambda entry: (entry.run, entry.step)))


def _absolute(folder: str, path: str) -> str:
    return path if path.startswith("/") or "://" in path or not folder else storage.join(folder, path)
