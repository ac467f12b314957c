"""From a bare forward pass up to the whole scoring stage, on one machine and the same pairs, as ratios.

    python -m tests.benchmarks.ladder [--shards GLOB] [--estimators diff-in tracin unrolled] [--checkpoints 4]
        [--folder FOLDER]

The rungs: open_clip's forward pass; scoring pairs that are decoded in memory; the same pairs from decoded tensors on
disk; the stage from tars through Ray (`diffprune score`). All run in the layout of the stage, one process of one thread
per CPU; all but the stage take one shard in each process. The stage is given twice: from command to end, and from the
first scored pair on, which is what a long run sees. What lies between is the start; the phases of the shards, from
their marks, say where the rest of a gap is. With `--folder` preparations (training, directions) are kept for the next
call. Without `--shards` the pairs are the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.config import Config
from pipeline.data.cache import build_cache
from pipeline.data.inventory import ShardInfo
from pipeline.data.reader import read_shard
from pipeline.influence import Scorer
from pipeline.influence.passes import chunks
from pipeline.models.clip import PairModel
from pipeline.models.manifest import Manifest
from pipeline.prepared import load_batches, load_plan, settings_of
from pipeline.run import RunFolder
from pipeline.stages.computing import ComputingJob
from pipeline.stages.job import open_job
from tests.benchmarks.models import MEDIUM

#: Forward passes that the flops of a checkpoint amount to.
LIMITS = {"diff-in": 6, "tracin": 3, "unrolled": 3}


def config_of(folder: Path, estimator: str, shards: str, checkpoints: int) -> dict[str, Any]:
    """The config of one estimator, as YAML would hold it."""
    model = folder / "model.json"
    model.write_text(json.dumps(MEDIUM))
    return {
        "out": str(folder / estimator),
        "data": {"shards": shards},
        "target": {"kind": "holdout", "pairs": 64},
        "reference": {"pairs": 64, "gradient_pairs": 64},
        "proxy": {
            "model": str(model),
            "steps": 2 * checkpoints,
            "batch_size": 32,
            "num_checkpoints": checkpoints,
        },
        "score": {"estimator": estimator},
    }


def stage(name: str, config: Path) -> float:
    """Seconds of one stage in a process of its own."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pipeline.cli", name, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return time.monotonic() - start


@dataclass(frozen=True)
class Share:
    """The shard of one of `processes`, and a way of scoring it (`forward`, `memory` or `disk`)."""

    config: Config
    shard: ShardInfo
    way: str
    processes: int


def measure(share: Share) -> tuple[float, float, int]:
    """When this process began and ended to work on its pairs, and how many they are; all else is done before."""
    torch.set_num_threads(1)
    config = share.config
    job = ComputingJob(config)
    model, decoder = job.model(), job.decoder
    cache = None
    if share.way == "disk":
        folder = Path(config.out, f"ladder-{share.shard.index}")
        cache = build_cache(str(folder), [share.shard], decoder, config.data.caption)
    with read_shard(share.shard.url, caption=config.data.caption) as reader:
        pairs = decoder.decode_shard(iter(reader)).batch
    scorer = None if share.way == "forward" else _scorer(config, model)
    with torch.no_grad():
        model(pairs.images[:32], pairs.tokens[:32])
    # All begin together, so that none has the machine to itself.
    (ready := Path(config.out, f"ready-{share.shard.index}")).touch()
    while len(list(Path(config.out).glob("ready-*"))) < share.processes:
        time.sleep(0.01)
    begun = time.time()
    if cache is not None:
        pairs = cache.batch(np.arange(len(pairs)))
    if scorer is not None:
        scorer.score(pairs)
    else:
        with torch.no_grad():
            for part in chunks(pairs, 32):
                model(part.images, part.tokens)
    ended = time.time()
    ready.unlink()
    return begun, ended, len(pairs)


def _scorer(config: Config, model: PairModel) -> Scorer:
    manifest = Manifest.read(RunFolder(config.out).checkpoint_manifest)
    parts = [(entry.load(model), load_plan(config.out, n)) for n, entry in enumerate(manifest.checkpoints)]
    return Scorer(model, parts, load_batches(config.out).reference, settings_of(config))


def in_processes(config: Config, shards: list[ShardInfo], way: str) -> float:
    """Pairs per second of one process per CPU."""
    count = min(os.cpu_count() or 1, len(shards))
    for left in Path(config.out).glob("ready-*"):
        left.unlink()
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(measure, [Share(config, shard, way, count) for shard in shards[:count]]))
    begun, ended, rows = zip(*found, strict=True)
    return sum(rows) / (max(ended) - min(begun))


def through_ray(path: Path, config: Config) -> dict[str, float]:
    """The stage: its seconds, pairs per second with and without the start, and how the workers spent their time."""
    folder = RunFolder(config.out)
    shutil.rmtree(folder.scores, ignore_errors=True)
    seconds = stage("score", path)
    marks = marks_of(folder)
    phases = {name: sum(mark["seconds"].get(name, 0.0) for mark in marks) for name in ("load", "waiting", "score")}
    begun = first_scored(marks)
    ended = max(mark["finished"] for mark in marks)
    pairs, workers = sum(mark["ok"] for mark in marks), len({mark["worker"] for mark in marks})
    busy = workers * (ended - begun)
    return {
        "seconds": seconds,
        "start": seconds - (ended - begun),
        "whole": pairs / seconds,
        "running": pairs / (ended - begun),
        **{name: value / busy for name, value in phases.items()},
    }


def marks_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The marks of all shards that are scored."""
    return [json.loads(file.read_text()) for file in sorted(Path(folder.scores).glob("*.json"))]


def first_scored(marks: list[dict[str, Any]]) -> float:
    """When the first shard's pairs came into the passes, in seconds of the clock."""
    return float(min(mark["finished"] - mark["seconds"]["score"] for mark in marks))


def climb(estimator: str, shards: str, checkpoints: int, folder: Path) -> None:
    """Print the rungs of one estimator."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{estimator}.yaml"
    path.write_text(yaml.safe_dump(config_of(folder, estimator, shards, checkpoints)))
    for name in ("inventory", "train", "directions"):
        stage(name, path)
    job = open_job(Config.model_validate(yaml.safe_load(path.read_text())))
    limit = LIMITS[estimator]
    print(f"{estimator}, {checkpoints} checkpoints, {job.samples} pairs in {len(job.inventory)} shards")
    print(f"  {'rung':34} {'pairs/s':>8}  of memory  forward passes per checkpoint (limit {limit})", flush=True)
    bare = in_processes(job.config, job.inventory, "forward")
    print(f"  {'bare forward pass':34} {bare:8.2f}", flush=True)
    memory = 0.0

    def rung(name: str, rate: float) -> None:
        print(f"  {name:34} {rate:8.2f}  {rate / memory:9.1%}  {bare / rate / checkpoints:.2f}", flush=True)

    memory = in_processes(job.config, job.inventory, "memory")
    rung("decoded in memory", memory)
    rung("decoded on disk", in_processes(job.config, job.inventory, "disk"))
    found = through_ray(path, job.config)
    rung("stage, from the first scored pair", found["running"])
    rung("stage, from the command", found["whole"])
    print(f"  at the limit of the flops: {bare / limit / checkpoints:.2f} pairs/s")
    shares = ", ".join(f"{name} {found[name]:.1%}" for name in ("score", "waiting", "load"))
    print(
        f"  stage: {found['seconds']:.1f} s, of it {found['start']:.1f} s start and end; of the workers' time: {shares}"
    )


def main() -> None:
    """Print the ladder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="demo:train")
    parser.add_argument("--estimators", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for estimator in options.estimators:
            climb(estimator, options.shards, options.checkpoints, options.folder or Path(temporary))


if __name__ == "__main__":
    main()
