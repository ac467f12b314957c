"""How fast near-duplicates are found, and how many of the planted ones.

    python -m tests.benchmarks.dedup_speed --pairs 100000 1000000 [--images FOLDER]

Embeddings (512 dimensions) are sums of two random members of a base set: with `--images` random projections of the
photos in the WebDataset tars below a folder, else draws from a mixture with a steep spectrum. One in twenty pairs is a
copy of another, moved along the difference of two base members or at random to a cosine between `--cosine` + 0.01 and
0.999. Prints one JSON line per size: seconds of each pass, CPU seconds, peak memory, recall of the planted copies.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config import BalanceConfig, DedupConfig, SelectConfig
from pipeline.run import RunFolder
from pipeline.selection.clusters import unit
from pipeline.selection.select import select
from pipeline.selection.tasks import thread_map
from pipeline.selection.write import keep_file
from pipeline.store import storage

DIM, COPIES, PER_FILE = 512, 20, 10_000

Float32 = npt.NDArray[np.float32]


def synthetic_base(rng: np.random.Generator) -> Float32:
    """20,000 unit vectors of 300 clusters, with a power-law spectrum."""
    spectrum = (np.arange(1, DIM + 1) ** -0.5).astype(np.float32)
    centres = rng.normal(size=(300, DIM)) * spectrum
    points = centres[rng.integers(0, 300, 20_000)] + 0.7 * rng.normal(size=(20_000, DIM)) * spectrum
    return unit(points.astype(np.float32))


def image_base(folder: str, rng: np.random.Generator) -> Float32:
    """Unit vectors of the photos in all tars below `folder`: centred 16-pixel thumbnails, projected at random."""
    thumbnails = []
    for path in sorted([*Path(folder).rglob("*.tar"), *Path(folder).rglob("*.tar.gz")]):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    image = Image.open(io.BytesIO(stream.read())).convert("RGB").resize((16, 16))
                    thumbnails.append(np.asarray(image, dtype=np.float32).reshape(-1))
    pixels = np.stack(thumbnails) / 255
    pixels -= pixels.mean(axis=0)
    return unit(pixels @ rng.normal(size=(pixels.shape[1], DIM)).astype(np.float32))


def embeddings(base: Float32, rng: np.random.Generator, count: int, cosine: float) -> Iterator[Float32]:
    """`count` unit vectors, some at a time; the last one in `COPIES` of them are copies of the first ones, in order."""
    copies = count // COPIES
    originals: list[Float32] = []
    for start in range(0, count - copies, PER_FILE):
        first, second = rng.integers(0, len(base), (2, min(PER_FILE, count - copies - start)))
        vectors = unit(base[first] + np.float32(0.7) * base[second])
        originals.append(vectors[: max(copies - start, 0)])
        yield vectors
    original = np.concatenate(originals)
    for start in range(0, copies, PER_FILE):
        mine = original[start : start + PER_FILE]
        along = base[rng.integers(0, len(base), len(mine))] - base[rng.integers(0, len(base), len(mine))]
        along[::2] = rng.normal(size=along[::2].shape)
        along -= (along * mine).sum(axis=1, keepdims=True) * mine
        angle = np.arccos(rng.uniform(cosine + 0.01, 0.999, len(mine))).astype(np.float32)[:, None]
        yield np.cos(angle) * mine + np.sin(angle) * unit(along)


def write_scores(run: RunFolder, chunks: Iterator[Float32], rng: np.random.Generator) -> None:
    """Committed score files with these image embeddings, a chunk each."""
    storage.make_folder(run.scores)
    for number, vectors in enumerate(chunks):
        mine = vectors.astype(np.float16)
        count = len(mine)
        both = np.concatenate([mine, np.zeros_like(mine)], axis=1)
        columns = {
            "uid": pa.array([rng.bytes(16).hex() for _ in range(count)]),
            "key": pa.array([f"{place:09d}" for place in range(count)]),
            "index": pa.array(np.arange(count, dtype=np.int32)),
            "status": pa.array(["ok"] * count),
            "utility": pa.array(rng.normal(size=count).astype(np.float32)),
            "source": pa.array(["a.example"] * count),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(both.reshape(-1)), 2 * DIM),
        }  # fmt: skip
        pq.write_table(pa.table(columns), run.score_file(number), row_group_size=4096, compression="zstd")
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
    parser.add_argument("--images", help="folder of WebDataset tars whose photos make the base set")
    parser.add_argument("--folder", help="where the files are written (and removed), default a temporary folder")
    options = parser.parse_args()
    for pairs in options.pairs:
        rng = np.random.default_rng(0)
        root = tempfile.mkdtemp(prefix="dedup-speed-", dir=options.folder)
        run = RunFolder(root)
        try:
            base = image_base(options.images, rng) if options.images else synthetic_base(rng)
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
                        "base": "images" if options.images else "synthetic",
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
