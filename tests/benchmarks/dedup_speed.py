"""How fast near-duplicates are found, and how many of the planted ones.

    python -m tests.benchmarks.dedup_speed --pairs 100000 1000000 [--run RUN]

The base set are the image embeddings in the scores of a finished run (`--run`, made with `score.embeddings: true`), or
draws from a mixture with a steep spectrum (512 dimensions). Each pair is a base member turned by 26 to 46 degrees
(cosine 0.9 to 0.7) along the difference of two others. One in twenty is a copy of another pair, turned in turn along
such a difference or at random to a cosine between `--cosine` + 0.01 and 0.999. Prints one JSON line per size: seconds
of each pass, CPU seconds, peak memory, recall of the planted copies.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import BalanceConfig, DedupConfig, SelectConfig
from pipeline.run import RunFolder
from pipeline.selection.clusters import unit
from pipeline.selection.select import select
from pipeline.selection.tasks import thread_map
from pipeline.selection.write import keep_file
from pipeline.store import storage
from pipeline.store.scores import PARQUET_OPTIONS

DIM, COPIES, PER_FILE = 512, 20, 10_000

Float32 = npt.NDArray[np.float32]


def synthetic_base(rng: np.random.Generator) -> Float32:
    """20,000 unit vectors of 300 clusters, with a power-law spectrum."""
    spectrum = (np.arange(1, DIM + 1) ** -0.5).astype(np.float32)
    centres = rng.normal(size=(300, DIM)) * spectrum
    points = centres[rng.integers(0, 300, 20_000)] + 0.7 * rng.normal(size=(20_000, DIM)) * spectrum
    return unit(points.astype(np.float32))


def run_base(run: RunFolder) -> Float32:
    """Unit image embeddings of all pairs that a run scored."""
    found = []
    for url in storage.list_files(run.scores, ".parquet"):
        column = pq.read_table(url, columns=["embedding"])["embedding"].combine_chunks().drop_null()
        both = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        found.append(both[:, : both.shape[1] // 2].astype(np.float32))
    return unit(np.concatenate(found))


def turned(
    vectors: Float32, base: Float32, rng: np.random.Generator, cosines: tuple[float, float], noise: bool
) -> Float32:
    """`vectors` [n, d] turned along differences of base members (with `noise` every other one at random) to a cosine
    between `cosines`."""
    first, second = rng.integers(0, len(base), (2, len(vectors)))
    along = base[first] - base[second]
    if noise:
        along[::2] = rng.normal(size=along[::2].shape)
    along -= (along * vectors).sum(axis=1, keepdims=True) * vectors
    angle = np.arccos(rng.uniform(*cosines, len(vectors))).astype(np.float32)[:, None]
    return np.cos(angle) * vectors + np.sin(angle) * unit(along)


def embeddings(base: Float32, rng: np.random.Generator, count: int, cosine: float) -> Iterator[Float32]:
    """`count` unit vectors, some at a time; the last one in `COPIES` of them are copies of the first ones, in order."""
    copies = count // COPIES
    originals: list[Float32] = []
    for start in range(0, count - copies, PER_FILE):
        chosen = rng.integers(0, len(base), min(PER_FILE, count - copies - start))
        vectors = turned(base[chosen], base, rng, (0.7, 0.9), noise=False)
        originals.append(vectors[: max(copies - start, 0)])
        yield vectors
    original = np.concatenate(originals)
    for start in range(0, copies, PER_FILE):
        yield turned(original[start : start + PER_FILE], base, rng, (cosine + 0.01, 0.999), noise=True)


def write_scores(run: RunFolder, chunks: Iterator[Float32], rng: np.random.Generator) -> None:
    """Committed score files with these image embeddings, a chunk each."""
    storage.make_folder(run.scores)
    for number, vectors in enumerate(chunks):
        mine = vectors.astype(np.float16)
        count = len(mine)
        both = np.concatenate([mine, np.roll(mine, 1, axis=0)], axis=1)  # the text half, which is not looked at
        columns = {
            "uid": pa.array([rng.bytes(16).hex() for _ in range(count)]),
            "key": pa.array([f"{place:09d}" for place in range(count)]),
            "index": pa.array(np.arange(count, dtype=np.int32)),
            "status": pa.array(["ok"] * count),
            "utility": pa.array(rng.normal(size=count).astype(np.float32)),
            "utility_std": pa.array(np.full(count, 0.5, np.float32)),
            "similarity": pa.array(rng.normal(size=count).astype(np.float32)),
            "width": pa.array(rng.integers(32, 512, count).astype(np.int32)),
            "content": pa.array([rng.bytes(16).hex() for _ in range(count)]),
            "caption_id": pa.array(rng.integers(0, 2**62, 1000)[rng.integers(0, 1000, count)]),
            "source": pa.array(["a.example"] * count),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(both.reshape(-1)), 2 * mine.shape[1]),
        }  # fmt: skip
        pq.write_table(pa.table(columns), run.score_file(number), **PARQUET_OPTIONS)
        mark = {
            "shard": number, "url": f"{number}.tar", "rows": count, "ok": count, "reasons": {}, "end_error": "",
            "bytes": 0, "checksum": "", "seconds": {}, "finished": 0.0, "worker": "", "fingerprint": "", "parts": {},
        }  # fmt: skip
        storage.write_json(run.score_mark(number), mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000])
    parser.add_argument("--cosine", type=float, default=0.95)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--run", help="folder of a finished run whose embeddings are the base set")
    parser.add_argument("--folder", help="where the files are written (and removed), default a temporary folder")
    options = parser.parse_args()
    for pairs in options.pairs:
        rng = np.random.default_rng(0)
        root = tempfile.mkdtemp(prefix="dedup-speed-", dir=options.folder)
        run = RunFolder(root)
        try:
            base = run_base(RunFolder(options.run)) if options.run else synthetic_base(rng)
            write_scores(run, embeddings(base, rng, pairs, options.cosine), rng)
            config = SelectConfig(
                keep=1.0, dedup=DedupConfig(cosine=options.cosine), balance=BalanceConfig(clusters=options.clusters)
            )
            start, cpu = time.perf_counter(), time.process_time()
            summary = select(run, config, seed=0, map_tasks=thread_map)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            stays = []
            for shard in summary.shards:
                kept = pq.read_table(keep_file(summary.folder, shard.shard), columns=["index"])["index"].to_numpy()
                stays.append(np.isin(np.arange(shard.rows), kept))
            stay = np.concatenate(stays)
            copies = pairs // COPIES
            missed = int((stay[:copies] & stay[pairs - copies :]).sum())
            print(
                json.dumps(
                    {
                        "pairs": pairs,
                        "base": len(base) if options.run else "synthetic",
                        "planted": copies,
                        "recall": round(1 - missed / copies, 5),
                        "removed": summary.pruned.get("near-duplicate", 0),
                        "seconds": round(wall, 1),
                        "cpu_seconds": round(cpu, 1),
                        "passes": summary.seconds,
                        "peak_mb": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024,
                    }
                ),
                flush=True,
            )
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
