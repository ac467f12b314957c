"""One run as its stages see it: the config, the folder, the shards, the seeded draws. Loads no torch."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from pipeline.config import Config
from pipeline.data.demo import demo_paths
from pipeline.data.inventory import ShardInfo, read_inventory
from pipeline.data.positions import Positions, draw_positions
from pipeline.errors import ConfigError, StageError
from pipeline.run import RunFolder
from pipeline.selection.kept import kept_positions
from pipeline.store import marks, storage
from pipeline.store.fingerprint import Fingerprint

DEMO_PREFIX = "demo:"

#: More positions are drawn than pairs are wanted, since some will turn out to be bad.
OVERDRAW = 1.25


@dataclass
class Job:
    """A config and what is derived from it once."""

    config: Config

    # Offsets to the run's seed, so that the draws are independent of each other.
    TARGET_SEED: ClassVar = 101
    REFERENCE_SEED: ClassVar = 102
    GRADIENT_SEED: ClassVar = 103
    POOL_SEED: ClassVar = 104
    BASELINE_SEED: ClassVar = 105

    @cached_property
    def folder(self) -> RunFolder:
        """Where the run's files are."""
        return RunFolder(self.config.out)

    @cached_property
    def inventory(self) -> list[ShardInfo]:
        """The input shards. Raises `StageError` before the inventory stage has finished."""
        if not storage.exists(self.folder.inventory):
            raise StageError(f"no inventory in {self.folder.root}: run `diffprune inventory CONFIG` first")
        return read_inventory(self.folder.inventory)

    @cached_property
    def inventory_digest(self) -> str:
        """Identity of the input: every shard's name, size, version and count."""
        rows = [[shard.name, shard.samples, shard.bytes, shard.etag] for shard in self.inventory]
        return Fingerprint({"shards": rows}).digest

    @cached_property
    def samples(self) -> int:
        """Input samples in all shards."""
        return sum(shard.samples for shard in self.inventory)

    @cached_property
    def threads(self) -> int:
        """Decoding threads of this process."""
        return self.config.engine.decode_threads or os.cpu_count() or 1

    def draw(self, count: int, seed: int, exclude: Positions | None = None) -> Positions:
        """Positions of `count` samples, drawn by the run's seed plus `seed`, none of `exclude`."""
        return draw_positions(self.samples, count, self.config.seed + seed, exclude)

    @cached_property
    def held_out_positions(self) -> Positions:
        """Positions of the pairs held out as the target: none unless `target.kind` is `holdout`."""
        target = self.config.target
        if target.kind != "holdout":
            return np.empty(0, np.int64)
        return self.draw(min(int(target.pairs * OVERDRAW) + 16, self.samples // 2), self.TARGET_SEED)

    @cached_property
    def barred_positions(self) -> Positions:
        """Positions of the pairs that no proxy run may train on: the target held out, and what `proxy.within` drops.

        Raises `StageError` where that is no finished selection over these shards.
        """
        if self.config.proxy.within is None:
            return self.held_out_positions
        within = kept_positions(self.config.proxy.within, self.inventory)
        return np.union1d(np.setdiff1d(np.arange(self.samples), within), self.held_out_positions)

    @cached_property
    def cache_folder(self) -> str:
        """Local folder of decoded training pairs: in the run's folder, or a temporary one for a remote run."""
        if storage.is_local(self.folder.root):
            return os.path.join(storage.local_path(self.folder.root), "cache")
        name = storage.checksum(self.folder.root.encode())
        return os.path.join(tempfile.gettempdir(), "diffprune", name)

    def is_current(self, mark_url: str, fingerprint: Fingerprint) -> bool:
        """Whether the work marked at `mark_url` is done with these settings.

        Raises `FingerprintError` for other settings with `engine.stale: refuse`.
        """
        return marks.is_current(mark_url, marks.read_mark(mark_url), fingerprint, self.config.engine.stale)

    def write_mark(self, mark_url: str, fingerprint: Fingerprint, content: dict[str, Any]) -> None:
        """Commit a stage."""
        marks.write_mark(mark_url, fingerprint, content)


def open_job(config: Config) -> Job:
    """The job of a config, with `demo:` paths replaced by those of the demo data in the run's folder.

    Raises `ConfigError` for a `demo:` path that there is not, or a run's folder that is not local.
    """
    wanted = [(section, key) for section, key in _PATHS if is_demo(_value(config, section, key))]
    if not wanted:
        return Job(config)
    if not storage.is_local(config.out):
        raise ConfigError("expected a local folder, `demo:` paths are written into it", key="out", found=config.out)
    demo = demo_paths(demo_folder(config))
    places: dict[str, Any] = {"train": demo.train, "target": demo.target, "test": demo.test, "truth": demo.truth}
    tree = config.model_dump()
    for section, key in wanted:
        name = str(tree[section][key]).removeprefix(DEMO_PREFIX)
        if name not in places:
            raise ConfigError(
                f"expected one of {', '.join(DEMO_PREFIX + place for place in places)}",
                key=f"{section}.{key}",
                found=tree[section][key],
            )
        tree[section][key] = places[name]
    return Job(Config.model_validate(tree))


def is_demo(path: object) -> bool:
    """Whether a path of a config stands for a part of the demo data."""
    return isinstance(path, str) and path.startswith(DEMO_PREFIX)


def uses_demo(config: Config) -> bool:
    """Whether any path of a config stands for demo data, so that they must be written first."""
    return any(is_demo(_value(config, section, key)) for section, key in _PATHS)


def demo_folder(config: Config) -> str:
    """Where the demo data of a run are."""
    return os.path.join(storage.local_path(config.out), "demo")


#: Keys whose value may be a `demo:` path.
_PATHS = (("data", "shards"), ("target", "shards"), ("evaluate", "shards"), ("evaluate", "truth"))


def _value(config: Config, section: str, key: str) -> object:
    return getattr(getattr(config, section), key, None)
