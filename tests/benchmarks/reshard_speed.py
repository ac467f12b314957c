"""How fast pruned tars and `uids.npy` are written, against `cat` copying the same input tars to the same disk.

    python -m tests.benchmarks.reshard_speed --shards 20 --folder /path/on/the/disk

Pairs of about 50 KB, 30 % of them kept at random. Each round times `cat`, the reshard in input order and the shuffled
one, tar by tar and with a thread per CPU (as `diffprune emit` writes a few tars), each ended by a flush to disk;
`--cold` drops the inputs from the page cache before each. Prints one JSON line, of medians over the rounds: written
bytes per second, their ratios to those of `cat` in the same round (the bar is 0.6), and CPU seconds per written GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.inventory import inspect_shard
from pipeline.emit.plan import Input, Plan
from pipeline.emit.reshard import reshard
from pipeline.emit.tar import TarWriter
from pipeline.emit.uids import read_uids, write_uids
from pipeline.selection.tasks import MapTasks, thread_map

PAIRS_PER_SHARD = 1000
KEPT = 0.3
UID_ROWS = 3_000_000


def make_inputs(folder: Path, shards: int) -> list[Input]:
    """Shards of random bytes with captions and json, their keep lists, and what the inventory keeps of them."""
    rng = np.random.default_rng(0)
    inputs = []
    for number in range(shards):
        path = folder / f"{number:05d}.tar"
        with open(path, "wb") as handle:
            writer = TarWriter(handle)
            for row in range(PAIRS_PER_SHARD):
                key = f"{number:05d}{row:06d}"
                writer.add(f"{key}.jpg", rng.bytes(int(rng.integers(30_000, 70_000))))
                writer.add(f"{key}.txt", b"a caption of ordinary length, more or less")
                writer.add(f"{key}.json", json.dumps({"uid": rng.bytes(16).hex()}).encode())
            writer.close()
        rows = np.sort(rng.choice(PAIRS_PER_SHARD, int(KEPT * PAIRS_PER_SHARD), replace=False))
        keep = folder / f"{number:05d}.parquet"
        columns = {
            "uid": [rng.bytes(16).hex() for _ in rows],
            "key": [f"{number:05d}{row:06d}" for row in rows],
            "index": pa.array(rows, pa.int32()),
        }
        pq.write_table(pa.table(columns), keep)
        places = folder / f"{number:05d}.places"
        inspect_shard(number, str(path), str(places))
        inputs.append(Input(number, path.name, str(path), str(keep), len(rows), str(places)))
    return inputs


def timed(inputs: list[Input], cold: bool, work: Callable[[], int]) -> tuple[float, float]:
    """Bytes per second and CPU seconds per GB of `work`, which returns the bytes that it wrote and flushed."""
    for item in inputs:
        with open(item.url, "rb") as handle:
            os.fsync(handle.fileno())
            advice = os.POSIX_FADV_DONTNEED if cold else os.POSIX_FADV_WILLNEED
            os.posix_fadvise(handle.fileno(), 0, 0, advice)
            while not cold and handle.read(1 << 24):
                pass
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    written = work()
    return written / (time.perf_counter() - start), (sum(os.times()[:4]) - cpu) / written * 1e9


def copy(inputs: list[Input], target: Path) -> int:
    """`cat` all inputs into one file."""
    with open(target, "wb") as handle:
        subprocess.run(["cat", *(item.url for item in inputs)], stdout=handle, check=True)
        os.fsync(handle.fileno())
    size = target.stat().st_size
    target.unlink()
    return size


def prune(inputs: list[Input], target: Path, seed: int | None, map_tasks: MapTasks) -> int:
    """Reshard the kept pairs."""
    stats = reshard(Plan(str(target), tuple(inputs), PAIRS_PER_SHARD, seed, False, "benchmark"), map_tasks)
    shutil.rmtree(target)
    return sum(entry.bytes for entry in stats)


def uid_rate(folder: Path) -> float:
    """Rows per second from keep lists to `uids.npy`."""
    rng = np.random.default_rng(1)
    urls = []
    for number in range(6):
        text = rng.bytes(16 * UID_ROWS // 6).hex()
        uids = [text[start : start + 32] for start in range(0, len(text), 32)]
        urls.append(str(folder / f"uids-{number}.parquet"))
        pq.write_table(pa.table({"uid": uids}), urls[-1], compression="zstd", use_dictionary=False)
    start = time.perf_counter()
    assert write_uids(str(folder / "uids.npy"), read_uids(urls), chunk=500_000) == UID_ROWS
    return UID_ROWS / (time.perf_counter() - start)


def medians(works: Iterable[str], values: npt.NDArray[np.float64]) -> dict[str, float]:
    """Of each kind of work, over the rounds; values `[rounds, works]`."""
    return dict(zip(works, np.median(values, axis=0).round(2).tolist(), strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to work; the default is the temporary folder")
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        inputs = make_inputs(folder, given.shards)
        works: dict[str, Callable[[], int]] = {
            "cat": lambda: copy(inputs, folder / "copy"),
            "in order": lambda: prune(inputs, folder / "out", None, map),
            "shuffled": lambda: prune(inputs, folder / "out", 0, map),
            "in order, threads": lambda: prune(inputs, folder / "out", None, thread_map),
            "shuffled, threads": lambda: prune(inputs, folder / "out", 0, thread_map),
        }
        rounds = [[timed(inputs, given.cold, work) for work in works.values()] for _ in range(given.rounds)]
        rates, cpu = np.array(rounds).transpose(2, 0, 1)
        result = {
            "input_bytes": sum(Path(item.url).stat().st_size for item in inputs),
            "cold": given.cold,
            "bytes_per_second": medians(works, rates),
            "cpu_seconds_per_gb": medians(works, cpu),
            "ratios": medians(works, rates / rates[:, :1]),
            "uids_per_second": round(uid_rate(folder)),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
