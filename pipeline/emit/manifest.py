"""Where the files of an emitted selection are, and `manifest.jsonl`: what is kept of each input shard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from pipeline.data.inventory import ShardInfo
from pipeline.selection.summary import SelectionSummary
from pipeline.selection.write import keep_file, keep_name
from pipeline.store import storage


@dataclass(frozen=True)
class SelectionFolder:
    """Paths of the files of one selection. `root` is a local path or an fsspec URL."""

    root: str

    def keep(self, shard: int) -> str:
        """The keep list of input shard number `shard` (Parquet: uid, key, index, utility)."""
        return keep_file(self.root, shard)

    @property
    def manifest(self) -> str:
        """One line per input shard (JSON lines)."""
        return storage.join(self.root, "manifest.jsonl")

    @property
    def uids(self) -> str:
        """DataComp's subset file."""
        return storage.join(self.root, "uids.npy")

    @property
    def shards(self) -> str:
        """Folder of the pruned tars."""
        return storage.join(self.root, "shards")

    @property
    def train_script(self) -> str:
        """The open_clip command."""
        return storage.join(self.root, "train.sh")

    @property
    def card(self) -> str:
        """The dataset card (Markdown)."""
        return storage.join(self.root, "README.md")

    @property
    def mark(self) -> str:
        """Written last: what was emitted, and of what (JSON)."""
        return storage.join(self.root, "emit.json")


@dataclass(frozen=True)
class ManifestLine:
    """What is kept of one input shard.

    Attributes:
        shard: file name of the input shard.
        url: where it is.
        num_samples: samples in it, bad ones included.
        num_kept: rows of its keep list.
        keep: the keep list, relative to the selection's folder; None for a shard that was set aside without scores.
    """

    shard: str
    url: str
    num_samples: int
    num_kept: int
    keep: str | None


def build_manifest(inventory: Sequence[ShardInfo], selection: SelectionSummary) -> list[ManifestLine]:
    """What a finished selection keeps of each input shard, in order of the inventory."""
    kept = {shard.shard: shard.kept for shard in selection.shards}
    return [
        ManifestLine(
            shard=info.name,
            url=info.url,
            num_samples=info.samples,
            num_kept=kept.get(info.index, 0),
            keep=keep_name(info.index) if info.index in kept else None,
        )
        for info in inventory
    ]


def write_manifest(url: str, lines: Iterable[ManifestLine]) -> None:
    """Write one JSON object per line."""
    with storage.atomic_writer(url) as handle:
        for line in lines:
            handle.write(json.dumps(asdict(line), ensure_ascii=False).encode() + b"\n")


def read_manifest(url: str) -> list[ManifestLine]:
    """Read what `write_manifest` wrote. Raises `ValueError` or `TypeError` for anything else."""
    return [ManifestLine(**json.loads(line)) for line in storage.read_bytes(url).splitlines()]
