"""A whole run over a million pairs: `python -m tests.benchmarks.scale_run --pairs 1000000 --shards 100`.

Writes real-format shards (64 px JPEG, caption, json) and runs `diffprune run` on them in processes of its own, with a
model so small that the engine and not the model is measured. Prints one JSON object: seconds of each stage, the peak
memory of the driver in each of them, that of a worker and of all workers together, and the exit status. With
`--pairs 100000` beside it, the driver's memory shows whether anything in it grows with the pairs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from pipeline.data.layout import BLOCK, padded
from pipeline.emit.tar import header
from pipeline.run import RunFolder
from pipeline.store import storage

#: Distinct pictures; captions and uids are all different.
PICTURES = 4096
SIDE = 64
WORDS = (
    "red",
    "old",
    "small",
    "wooden",
    "dog",
    "house",
    "boat",
    "tree",
    "beside",
    "under",
    "a",
    "the",
    "near",
    "bright",
)

#: A model that costs little more than nothing per pair.
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}

#: The file that shows that a stage is over, in the order of the stages.
ENDS = {
    "inventory": "inventory",
    "train": "checkpoint_manifest",
    "directions": "directions_mark",
}


def pictures() -> list[bytes]:
    """Smooth random JPEGs of about two kilobytes."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def write_shard(path: str, first: int, count: int) -> None:
    """One tar of `count` pairs, numbered from `first`."""
    images = pictures()
    rng = np.random.default_rng([1, first])
    words = rng.integers(0, len(WORDS), (count, 6))
    with open(path, "wb") as file:
        for place, number in enumerate(range(first, first + count)):
            caption = " ".join([*(WORDS[word] for word in words[place]), str(number)])
            meta = {"uid": f"{number:032x}", "url": f"https://site{number % 100}.example/{number}.jpg"}
            key = f"{number:09d}"
            members = (
                (".jpg", images[number % PICTURES]),
                (".txt", caption.encode()),
                (".json", json.dumps(meta).encode()),
            )
            for suffix, content in members:
                file.write(header(key + suffix, len(content)))
                file.write(content.ljust(padded(len(content)), b"\0"))
        file.write(bytes(2 * BLOCK))


def write_input(folder: Path, pairs: int, shards: int) -> int:
    """All shards and the model's config; bytes of the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(MODEL))
    bounds = [pairs * number // shards for number in range(shards + 1)]
    paths = [folder / f"{number:05d}.tar" for number in range(shards)]
    with ProcessPoolExecutor() as pool:
        counts = [bounds[number + 1] - bounds[number] for number in range(shards)]
        list(pool.map(write_shard, [str(path) for path in paths], bounds[:-1], counts))
    return sum(path.stat().st_size for path in paths)


def config_of(folder: Path, pairs: int, shards: int) -> dict[str, Any]:
    """The config of the run, as YAML would hold it."""
    return {
        "out": str(folder / "run"),
        "data": {"shards": str(folder / f"{{00000..{shards - 1:05d}}}.tar")},
        "target": {"pairs": 64},
        "reference": {"pairs": 64, "gradient_pairs": 256},
        "proxy": {
            "model": str(folder / "model.json"),
            "subset": min(0.4, 10_000 / pairs),
            "steps": 100,
            "batch_size": 128,
            "lr": 1e-3,
            "num_checkpoints": 2,
        },
        "score": {"estimator": "tracin", "batch_size": 1024},
        "select": {"keep": 0.5},
        "emit": {"materialize": True, "pairs_per_shard": 10_000},
    }


class Watch:
    """Memory of a command's processes: the driver by stage, and its Ray workers."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.driver: dict[str, int] = {}
        self.worker = 0
        self.workers = 0
        self.processes = 0

    def look(self, driver: psutil.Process) -> None:
        """Take one sample."""
        try:
            own = driver.memory_info().rss
            children = driver.children(recursive=True)
        except psutil.Error:
            return
        stage = self.stage()
        self.driver[stage] = max(self.driver.get(stage, 0), own)
        sizes = [size for child in children if (size := _worker_bytes(child)) is not None]
        self.worker = max(self.worker, *sizes, 0)
        self.workers = max(self.workers, sum(sizes))
        self.processes = max(self.processes, len(sizes))

    def stage(self) -> str:
        """The stage that is at work, by the files that earlier ones leave."""
        for stage, name in ENDS.items():
            if not storage.exists(getattr(self.run, name)):
                return stage
        done = storage.read_json(self.run.summary)["seconds"] if storage.exists(self.run.summary) else {}
        return next((stage for stage in ("score", "select", "emit", "report") if stage not in done), "report")


def _worker_bytes(process: psutil.Process) -> int | None:
    """Resident bytes of a Ray worker that is or was at work; None for Ray's own processes."""
    try:
        return process.memory_info().rss if process.name().startswith("ray::") else None
    except psutil.Error:
        return None


def measure(folder: Path, pairs: int, shards: int) -> dict[str, Any]:
    """Make the input, run the job, and say what it took."""
    start = time.monotonic()
    size = write_input(folder, pairs, shards)
    made = time.monotonic() - start
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(folder, pairs, shards)))
    run = RunFolder(str(folder / "run"))
    watch = Watch(run)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pipeline.cli", "run", str(config)])
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        watch.look(driver)
        time.sleep(0.5)
    total = time.monotonic() - start
    summary = storage.read_json(run.summary)
    return {
        "pairs": pairs,
        "shards": shards,
        "input_mib": size >> 20,
        "seconds_to_make_input": round(made),
        "exit_status": process.returncode,
        "seconds": round(total),
        "stages": summary["seconds"],
        "counts": summary.get("counts"),  # none where the run did not get so far
        "driver_mib": {stage: value >> 20 for stage, value in watch.driver.items()},
        "worker_mib": watch.worker >> 20,
        "workers_mib": watch.workers >> 20,
        "worker_processes": watch.processes,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--folder", help="where input and run go (5 GB per million pairs); removed afterwards")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="scale-run-", dir=options.folder))
    try:
        print(json.dumps(measure(place, options.pairs, options.shards), indent=2))
    finally:
        shutil.rmtree(place)
