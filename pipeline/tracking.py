"""Scalars of trainings for experiment trackers: TensorBoard beside a local run, Weights & Biases where asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from pipeline.config import Config
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.text import without_secrets


class Board:
    """The scalars of one training. Use as a context manager, or call `close`."""

    def __init__(self, folder: RunFolder, config: Config, name: str, first_step: int = 1) -> None:
        """Open what the config asks for.

        Args:
            folder: the run's folder; TensorBoard's files go to `tensorboard/` in it.
            config: its `track` is used; Weights & Biases shows all of it but what in addresses gives access.
            name: the training's, such as `run-000`; with `/` for groups.
            first_step: scalars of this step and later ones that an interrupted training left behind are replaced.
        """
        self._add: list[Callable[[int, dict[str, float]], None]] = []
        self._close: list[Callable[[], Any]] = []
        local = storage.local_path(folder.root) if storage.is_local(folder.root) else None
        if local is not None:  # object stores cannot be appended to
            self._open_tensorboard(storage.join(local, "tensorboard", name), first_step)
        if config.track.wandb is not None:
            self._open_wandb(folder.root, config, config.track.wandb, name, local)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the values of one step, by name."""
        for add in self._add:
            add(step, values)

    def close(self) -> None:
        """Write out what is still in memory."""
        for close in self._close:
            close()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_tensorboard(self, folder: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder, purge_step=first_step)

        def add(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key.replace(" ", "_"), value, step)

        self._add.append(add)
        self._close.append(writer.close)

    def _open_wandb(self, root: str, config: Config, project: str, name: str, local: str | None) -> None:
        import wandb

        if local is not None:
            os.makedirs(local, exist_ok=True)
        run = wandb.init(
            project=project,
            group=storage.basename(root.rstrip("/")),
            name=name,
            # The same training, started again, goes on in the same run of the tracker.
            id=hashlib.blake2b(f"{root}\n{name}".encode(), digest_size=8).hexdigest(),
            resume="allow",
            reinit="create_new",
            config=json.loads(without_secrets(config.model_dump_json())),
            dir=local,
            settings=wandb.Settings(console="off", silent=True),
        )
        run.define_metric("*", step_metric="step")
        self._add.append(lambda step, values: run.log({"step": step, **values}))
        self._close.append(run.finish)
