"""A finished run for tests of the hand-over: real shards, made-up scores with their marks, a real selection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.config import Config, parse_config
from pipeline.data.inventory import ShardInfo, inspect_shard, write_inventory
from pipeline.data.reader import read_shard
from pipeline.emit.manifest import SelectionFolder
from pipeline.run import RunFolder
from pipeline.selection.select import select
from pipeline.store import storage
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import score_schema, score_table

FINGERPRINT = Fingerprint({"score": {"estimator": "tracin", "loss": "marginal"}, "checkpoints": ["abc"]})


@dataclass
class MadeRun:
    """What the tests look at."""

    run: RunFolder
    config: Config
    inventory: list[ShardInfo]

    @property
    def folder(self) -> SelectionFolder:
        return SelectionFolder(self.run.selection(self.config.select.name))

    def kept(self) -> list[tuple[int, str, str, int]]:
        """Input shard, uid, key, index of every kept pair, in input order."""
        rows = []
        for info in self.inventory:
            table = pq.read_table(storage.local_path(self.folder.keep(info.index)))
            rows += [
                (info.index, uid, key, index)
                for uid, key, index in zip(*(table[name].to_pylist() for name in ("uid", "key", "index")), strict=True)
            ]
        return rows


def make_run(folder: Path | str, shards: list[str], keep: float = 0.5, seed: int = 0, **sections: Any) -> MadeRun:
    """Score every readable sample of `shards` at random and keep the best `keep` of them, without any stage."""
    run = RunFolder(str(folder))
    data = {"shards": shards, **sections.pop("data", {})}
    config = parse_config({"out": run.root, "data": data, "select": {"keep": keep}, **sections})
    caption = config.data.caption
    fingerprint = Fingerprint({"preprocessing": {"caption": caption}, **FINGERPRINT.parts})
    inventory = [inspect_shard(index, url, run.places(index)) for index, url in enumerate(shards)]
    write_inventory(run.inventory, inventory)
    rng = np.random.default_rng(seed)
    for info in inventory:
        samples = list(read_shard(info.url, caption=caption))
        utility = rng.normal(size=len(samples)).astype(np.float32)
        utility[[sample.status != "ok" for sample in samples]] = np.nan
        columns: dict[str, list[Any]] = {name: [None] * len(samples) for name in score_schema().names}
        columns |= {
            "uid": [sample.uid for sample in samples],
            "key": [sample.key for sample in samples],
            "shard": [info.name] * len(samples),
            "index": [sample.index for sample in samples],
            "status": [sample.status for sample in samples],
            "error": [sample.error for sample in samples],
            "utility": [None if np.isnan(value) else float(value) for value in utility],
            "predicted": [False] * len(samples),
        }
        commit_scores(
            run, info, score_table(columns), fingerprint, estimator="tracin", seconds={"decode": 0.1}, finished=1.0
        )
    select(run, config.select, seed=config.seed)
    return MadeRun(run, config, inventory)
