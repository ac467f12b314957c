"""Where each file of a run's folder is (the layout of `docs/outputs.md`), local or on an object store."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.store import storage


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of one run. `root` is a local path or an fsspec URL."""

    root: str

    @property
    def config(self) -> str:
        """The resolved config that made the scores, versions, diffprune's git revision, and the fingerprint (YAML)."""
        return storage.join(self.root, "config.yaml")

    @property
    def driver(self) -> str:
        """Which process takes inventory, trains or scores, renewed every few seconds while one does (JSON)."""
        return storage.join(self.root, "driver.json")

    @property
    def inventory(self) -> str:
        """One row per input shard (Parquet)."""
        return storage.join(self.root, "inventory.parquet")

    def places(self, shard: int) -> str:
        """Where each member of input shard number `shard` lies, if it is a plain tar (Parquet)."""
        return storage.join(self.root, "places", f"{shard:05d}.parquet")

    @property
    def checkpoints(self) -> str:
        """Folder of the recorded checkpoints."""
        return storage.join(self.root, "checkpoints")

    @property
    def checkpoint_manifest(self) -> str:
        """The list of checkpoints (JSON), written when the last of them is there."""
        return storage.join(self.checkpoints, "manifest.json")

    @property
    def decoding(self) -> str:
        """How many pairs are decoded for trainings, renewed every few seconds while they are (JSON)."""
        return storage.join(self.root, "cache", "decoding.json")

    @property
    def directions(self) -> str:
        """Folder with one safetensors file per checkpoint."""
        return storage.join(self.root, "directions")

    @property
    def directions_mark(self) -> str:
        """Written last: the directions are complete, and for which fingerprint (JSON)."""
        return storage.join(self.directions, "manifest.json")

    @property
    def scores(self) -> str:
        """Folder of the score files and their commit marks."""
        return storage.join(self.root, "scores")

    def score_file(self, shard: int) -> str:
        """Scores of input shard number `shard` (Parquet)."""
        return storage.join(self.scores, f"{shard:05d}.parquet")

    def score_mark(self, shard: int) -> str:
        """The commit mark of input shard number `shard` (JSON)."""
        return storage.join(self.scores, f"{shard:05d}.json")

    @property
    def sample(self) -> str:
        """With `score.sample`: a folder like this one, with the computed scores of the sampled pairs and the embeddings
        of all; its `scores/` are no longer needed once all shards are scored."""
        return storage.join(self.root, "sample")

    @property
    def regressor(self) -> str:
        """With `score.sample`: what the other pairs' scores are predicted with (safetensors)."""
        return storage.join(self.sample, "regressor.safetensors")

    @property
    def regressor_mark(self) -> str:
        """Its commit mark: rank correlation on held-out pairs, by the share that is sampled (JSON)."""
        return storage.join(self.sample, "regressor.json")

    def failure_file(self, shard: int) -> str:
        """Why input shard number `shard` was set aside (JSON)."""
        return storage.join(self.root, "failed", f"{shard:05d}.json")

    def selection(self, name: str = "default") -> str:
        """Folder of a selection: `pruned/` for the default one, `selections/NAME/` for the others."""
        return storage.join(self.root, "pruned") if name == "default" else storage.join(self.root, "selections", name)

    @property
    def summary(self) -> str:
        """Counts, thresholds, timings and throughput of the whole run (JSON)."""
        return storage.join(self.root, "summary.json")

    @property
    def report(self) -> str:
        """The report page."""
        return storage.join(self.root, "report", "index.html")


def run_of(selection: str) -> RunFolder:
    """The run that a selection's folder (`RUN/pruned` or `RUN/selections/NAME`) is in."""
    root = selection.rstrip("/").rpartition("/")[0]
    return RunFolder(root.rpartition("/")[0] if storage.basename(root) == "selections" else root)
