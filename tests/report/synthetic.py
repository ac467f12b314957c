"""A finished run made without running anything: shards with small images, scores, selections, summary."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.config import Config, parse_config
from pipeline.data.inventory import ShardInfo, inspect_shard, write_inventory
from pipeline.data.reader import read_shard
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.store.commits import commit_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.scores import embedding_column, score_table
from tests.helpers import caption_of, image_bytes, sample_members, uid_of, write_tar

HOSTILE = '</script><script>window.hacked=1</script>\u202e<img src=x onerror="window.hacked=1"> \'quoted\' & "so"'
#: Place of the pair with the hostile caption, one of the lowest: shard and index.
HOSTILE_AT = (0, 7)
CHECKPOINTS = 4
DIMENSION = 8


@dataclass(frozen=True)
class Made:
    """A run's folder with its config, its inventory, and the score columns of each shard as written."""

    run: RunFolder
    config: Config
    inventory: list[ShardInfo]
    tables: list[pa.Table]

    def column(self, name: str) -> np.ndarray:
        """A column over all shards."""
        return np.concatenate([table[name].to_numpy(zero_copy_only=False) for table in self.tables])


def make_run(
    folder: Path,
    *,
    shards: int = 5,
    samples: int = 100,
    size: int = 48,
    keep: float = 0.6,
    extras: bool = True,
    spread: bool = True,
    seed: int = 0,
) -> Made:
    """Write a run of `shards * samples` pairs, six of the first shard's rejected, into `folder / "run"`.

    With `extras`, there are a second selection, a summary with quality and timings, and evaluation results.
    """
    rng = np.random.default_rng(seed)
    run = RunFolder(str(folder / "run"))
    urls = [_write_shard(folder / "data", shard, samples, size) for shard in range(shards)]
    inventory = [inspect_shard(index, url) for index, url in enumerate(urls)]
    write_inventory(run.inventory, inventory)
    tables = [_score(run, info, rng, spread) for info in inventory]
    config = parse_config(
        {"out": run.root, "data": {"shards": urls}, "select": {"keep": keep}, "report": {"gallery": 8}}
    )
    recorded = {"versions": {"torch": "2.13.0"}, "fingerprint": "0123abcd", "config": config.model_dump(mode="json")}
    storage.write_bytes(run.config, yaml.safe_dump(recorded, sort_keys=False).encode())
    steps = [{"path": f"{i}.safetensors", "step": 100 * (i % 2 + 1), "lr": 5e-4 / (i % 2 + 1), "run": i // 2}
             for i in range(CHECKPOINTS)]  # fmt: skip
    storage.write_json(
        run.checkpoint_manifest, {"dataset_size": shards * samples, "optimizer": "adamw", "checkpoints": steps}
    )
    utility = np.concatenate([table["utility"].to_numpy(zero_copy_only=False) for table in tables])
    select(run, tables, "default", float(np.nanquantile(utility, 1 - keep)), "utility")
    if extras:
        select(run, tables, "similar", 0.2, "similarity")
        _write_extras(run)
    return Made(run, config, inventory, tables)


def select(run: RunFolder, tables: list[pa.Table], name: str, threshold: float, by: str) -> None:
    """Write the keep lists of a selection: scored pairs with `by` at or above the threshold."""
    for shard, table in enumerate(tables):
        values = table[by].to_numpy(zero_copy_only=False)
        ok = np.asarray(table["status"].to_pylist()) == "ok"
        kept = table.select(["uid", "key", "index", "utility"]).filter(pa.array(ok & (values >= threshold)))
        buffer = io.BytesIO()
        pq.write_table(kept, buffer)
        storage.write_bytes(storage.join(run.selection(name), "keep", f"{shard:05d}.parquet"), buffer.getvalue())


def _write_shard(folder: Path, shard: int, samples: int, size: int) -> str:
    members = []
    for index in range(samples):
        number = shard * samples + index
        image: bytes | None = image_bytes((size, size + 8 * (number % 3)), seed=number)
        caption: str | None = caption_of(number % 12) if number % 3 else f"{caption_of(number)} and number {number}"
        if shard == 0:
            if index in (1, 2, 3):
                image = b"this is no JPEG"
            elif index == 4:
                caption = None
            elif index in (5, 6):
                caption = "  "
            elif (shard, index) == HOSTILE_AT:
                caption = HOSTILE
        meta = {"uid": uid_of(number), "url": f"https://site{number % 7}.example/{number}.jpg"}
        members += sample_members(f"{number:08d}", image, caption, meta)
    return write_tar(folder / f"{shard:05d}.tar", members)


def _score(run: RunFolder, info: ShardInfo, rng: np.random.Generator, spread: bool) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in (
        "uid", "key", "shard", "index", "status", "error", "utility", "utility_std", "score", "terms",
        "predicted", "loss", "similarity", "width", "height", "caption_length", "source", "content", "caption_id",
    )}  # fmt: skip
    with read_shard(info.url) as reader:
        for sample in reader:
            status = sample.status
            if sample.image == b"this is no JPEG":
                status = "corrupt-image"
            ok = status == "ok"
            quality = rng.normal() + 0.4 * (sample.index % 7 - 3) / 3
            if (info.index, sample.index) == HOSTILE_AT:
                quality = -8.0
            terms = 1e-5 * (-quality * np.array([0.5, 1.0, 0.4, 0.9]) + rng.normal(size=CHECKPOINTS))
            terms = terms.astype(np.float32)
            score = float(terms.sum())
            row = {
                "uid": sample.uid, "key": sample.key, "shard": info.name, "index": sample.index, "status": status,
                "error": "" if ok else sample.error or "cannot identify image file",
                "utility": -score if ok else None,
                "utility_std": 1e-5 * float(rng.uniform(0.5, 2)) if ok and spread else None,
                "score": score if ok else None, "terms": terms.tolist() if ok else None,
                "predicted": False,
                "loss": float(4 - 0.6 * quality + 0.3 * rng.normal()) if ok else None,
                "similarity": float(np.clip(0.2 + 0.05 * quality + 0.05 * rng.normal(), -1, 1)) if ok else None,
                "width": 48, "height": 48, "caption_length": len(sample.caption or ""),
                "source": (sample.meta or {}).get("url", "https:///").split("/")[2], "content": "",
                "caption_id": hash_caption(sample.caption or ""),
            }  # fmt: skip
            for name, value in row.items():
                columns[name].append(value)
    count = len(columns["uid"])
    vectors = rng.normal(size=(count, 2, DIMENSION))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    embedding = embedding_column(vectors.reshape(count, -1).astype(np.float16), np.arange(count), count)
    table = score_table(columns, embedding)
    commit_scores(run, info, table, Fingerprint({"estimator": "diff-in"}), estimator="diff-in",
                  seconds={"decode": 1.0, "score": 2.0}, finished=0.0)  # fmt: skip
    return table


def hash_caption(text: str) -> int:
    """A stand-in for the caption's hash: equal for equal captions."""
    return int(uid_of(0, text)[:12], 16)


def _write_extras(run: RunFolder) -> None:
    detection = {"auroc": 0.83, "average_precision": 0.6, "precision": 0.42, "recall": 0.8, "base_rate": 0.2,
                 "suspects": 198, "pairs": 494}  # fmt: skip
    storage.write_json(
        run.summary,
        {
            "quality": {
                "precision": 0.4,
                "base_rate": 0.2,
                "by": {"utility": detection, "similarity": {**detection, "auroc": 0.71}},
            },
            "seconds": {"train": 81.5, "score": 42.25, "select": 0.4},
            "scores": {"pairs_per_worker_second": 311.25, "worker_seconds": {"decode": 3.5, "score": 40.1}},
        },
    )
    rows = [
        {"set": name, "series": series, "share": share, "size": size, "metric": "zero-shot accuracy", "mean": mean,
         "std": std, "seeds": 3, "values": [mean - std, mean, mean + std]}
        for name, series, share, size, mean, std in (
            ("kept", "kept", 0.6, 296, 0.62, 0.012), ("everything", "full", None, 494, 0.6, 0.02),
            ("random", "random", 0.6, 296, 0.55, 0.015),
        )
    ]  # fmt: skip
    storage.write_json(storage.join(run.root, "evaluation", "results.json"), {"rows": rows})
