"""The driver alone: many shards of actors that do nothing, how many per second, and whether memory stays flat.

Run as `python -m tests.benchmarks.driver_throughput --shards 100000`; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import EngineConfig
from pipeline.data.inventory import ShardInfo
from pipeline.engine.connect import connect
from pipeline.engine.scoring import score_shards
from pipeline.run import RunFolder
from pipeline.store.fingerprint import Fingerprint


@dataclass(frozen=True)
class IdleSpec:
    """Makes workers that do nothing."""

    def build(self, worker: str) -> IdleWork:
        return IdleWork()


class IdleWork:
    """Loads, scores and writes nothing."""

    def load(self, shard: ShardInfo) -> None:
        return None

    def score(self, shard: ShardInfo, loaded: None) -> None:
        return None

    def commit(self, shard: ShardInfo, scored: None, seconds: dict[str, float]) -> dict[str, int]:
        return {"ok": 10_000}


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class MemorySamples:
    """Resident memory, sampled twice a second in a thread."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(0.5):
            self.samples.append((time.monotonic(), resident_bytes()))

    def __enter__(self) -> MemorySamples:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(count: int, workers: int) -> dict[str, float]:
    """Score `count` empty shards; figures of the driver."""
    shards = [
        ShardInfo(i, f"s3://bucket/{i:08d}.tar", f"{i:08d}.tar", 10_000, 1 << 28, f"{i:032x}") for i in range(count)
    ]
    config = EngineConfig(workers=workers, cpus_per_worker=1)
    with tempfile.TemporaryDirectory() as folder, connect(config), MemorySamples() as memory:
        before = resident_bytes()
        outcome = score_shards(IdleSpec(), shards, RunFolder(folder), Fingerprint({"benchmark": 1}), config)
        after = resident_bytes()
    assert outcome.done == count
    quarter = [size for _, size in memory.samples[: max(1, len(memory.samples) // 4)]]
    return {
        "shards": count,
        "seconds": round(outcome.seconds, 1),
        "shards_per_second": round(count / outcome.seconds),
        "mib_before": before >> 20,
        "mib_first_quarter": max(quarter) >> 20,
        "mib_peak": max(size for _, size in memory.samples) >> 20,
        "mib_after": after >> 20,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps(measure(options.shards, options.workers)))
