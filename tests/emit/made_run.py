"""A finished run made by hand for tests of the hand-over: shards, scores with their marks, keep lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config, parse_config
from pipeline.data.inventory import ShardInfo, inspect_shard, write_inventory
from pipeline.data.reader import read_shard
from pipeline.emit.manifest import SelectionFolder
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import score_schema, score_table

FINGERPRINT = Fingerprint({"estimator": "tracin", "checkpoints": ["abc"], "settings": {"loss": "marginal"}})
KEEP_SCHEMA = pa.schema([("uid", pa.string()), ("key", pa.string()), ("index", pa.int32()), ("utility", pa.float32())])


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
    config = parse_config({"out": run.root, "data": {"shards": shards}, **sections})
    inventory = [inspect_shard(index, url) for index, url in enumerate(shards)]
    write_inventory(run.inventory, inventory)
    rng = np.random.default_rng(seed)
    scored: list[tuple[ShardInfo, list[Any], np.ndarray]] = []
    for info in inventory:
        samples = list(read_shard(info.url))
        utility = rng.normal(size=len(samples)).astype(np.float32)
        utility[[sample.status != "ok" for sample in samples]] = np.nan
        scored.append((info, samples, utility))
        columns: dict[str, list[Any]] = {name: [None] * len(samples) for name in score_schema().names}
        columns |= {
            "uid": [sample.uid for sample in samples],
            "key": [sample.key for sample in samples],
            "shard": [info.name] * len(samples),
            "index": [sample.index for sample in samples],
            "status": [sample.status for sample in samples],
            "error": [sample.error for sample in samples],
            "utility": [None if np.isnan(value) else float(value) for value in utility],
        }
        commit_scores(
            run, info, score_table(columns), FINGERPRINT, estimator="tracin", seconds={"decode": 0.1}, finished=1.0
        )
    values = np.sort(np.concatenate([utility[np.isfinite(utility)] for _, _, utility in scored]))
    threshold = values[len(values) - max(1, round(keep * len(values)))]
    selection = SelectionFolder(run.selection(config.select.name))
    for info, samples, utility in scored:
        mine = [(sample, value) for sample, value in zip(samples, utility, strict=True) if value >= threshold]
        rows = [
            {"uid": sample.uid, "key": sample.key, "index": sample.index, "utility": value} for sample, value in mine
        ]
        with storage.atomic_writer(selection.keep(info.index)) as handle:
            pq.write_table(pa.Table.from_pylist(rows, schema=KEEP_SCHEMA), handle)
    return MadeRun(run, config, inventory)
