"""How fast an exact cut is: synthetic scores in Parquet, against DuckDB's way to the same answer on the same files.

    python -m tests.benchmarks.selection_speed --pairs 10000000 30000000 100000000

Prints one JSON line per size: seconds and peak memory of the cut and of writing the keep lists, DuckDB's seconds for
the cut, and their ratio. Both use two threads and run one after the other, several times; the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import SelectConfig
from pipeline.run import RunFolder
from pipeline.selection.plan import plan_selection
from pipeline.selection.select import select
from pipeline.selection.tasks import thread_map
from pipeline.store import storage
from pipeline.store.scores import PARQUET_OPTIONS

KEEP = 0.3


def write_scores(run: RunFolder, pairs: int, per_file: int) -> None:
    """Committed score files with the columns that a selection reads; utilities normal, a few ties and failures."""
    storage.make_folder(run.scores)
    for number, start in enumerate(range(0, pairs, per_file)):
        count = min(per_file, pairs - start)
        rng = np.random.default_rng(number)
        digits = np.frombuffer(b"0123456789abcdef", np.uint8)
        octets = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        text = np.stack([digits[octets >> 4], digits[octets & 15]], axis=2).reshape(-1)
        offsets = np.arange(count + 1, dtype=np.int32) * 32
        uids = pa.Array.from_buffers(pa.string(), count, [None, pa.py_buffer(offsets), pa.py_buffer(text)])
        utility = rng.normal(size=count).astype(np.float32)
        failed = rng.random(count) < 0.001
        index = pa.array(np.arange(count, dtype=np.int32))
        columns = {
            "uid": uids,
            "key": pc.utf8_lpad(index.cast(pa.string()), 9, "0"),
            "index": index,
            "status": pa.array(np.where(failed, "corrupt-image", "ok")),
            "utility": pa.array(utility, mask=failed),
            "source": pa.array(np.where(failed, "a.example", "b.example")),
        }
        url = run.score_file(number)
        pq.write_table(pa.table(columns), url, **PARQUET_OPTIONS)
        mark = {
            "shard": number, "url": f"{number}.tar", "rows": count, "ok": 0, "reasons": {}, "end_error": "", "bytes": 0,
            "checksum": "", "seconds": {}, "finished": 0.0, "worker": "", "fingerprint": "", "parts": {},
        }  # fmt: skip
        storage.write_json(run.score_mark(number), mark)


def cut(root: str) -> dict[str, Any]:
    """The exact boundary of our selection."""
    config = SelectConfig(keep=KEEP)
    plan = plan_selection(RunFolder(root), config, seed=0, scratch=f"{root}/scratch", map_tasks=thread_map)
    uid = f"{int(plan.end.high[0]):016x}{int(plan.end.low[0]):016x}"
    return {"kept": plan.kept, "threshold": plan.threshold, "uid": uid}


def cut_duckdb(root: str) -> dict[str, Any]:
    """DuckDB's way to the same answer: the count, the quantile, and the tied uids."""
    import duckdb

    database = duckdb.connect()
    database.execute("SET threads = 2")
    scores = f"read_parquet('{root}/scores/*.parquet')"
    good = "status = 'ok' AND isfinite(utility)"
    (scored,) = database.execute(f"SELECT count(*) FROM {scores} WHERE {good}").fetchone()  # type: ignore[misc]
    kept = int(KEEP * scored + 0.5)
    (threshold,) = database.execute(
        f"SELECT quantile_disc(utility, {(scored - kept + 0.5) / scored!r}) FROM {scores} WHERE {good}"
    ).fetchone()  # type: ignore[misc]
    (above,) = database.execute(
        f"SELECT count(*) FROM {scores} WHERE {good} AND utility > ?::FLOAT", [threshold]
    ).fetchone()  # type: ignore[misc]
    tied = database.execute(
        f"SELECT uid FROM {scores} WHERE {good} AND utility = ?::FLOAT ORDER BY uid", [threshold]
    ).fetchall()
    (uid,) = tied[kept - above - 1]
    return {"kept": kept, "threshold": threshold, "uid": uid}


def write(root: str) -> dict[str, Any]:
    """The whole selection with its keep lists."""
    summary = select(RunFolder(root), SelectConfig(keep=KEEP), seed=0, map_tasks=thread_map)
    return {"kept": summary.kept, "seconds": summary.seconds}


def measured(function: Callable[[str], dict[str, Any]], root: str) -> dict[str, Any]:
    """Run `function` in a fresh process: its result, seconds and peak memory (with the imports)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (function, root))


def _measure(function: Callable[[str], dict[str, Any]], root: str) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    result = function(root)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory before the exec
    peak = int(status.split("VmHWM:")[1].split()[0])
    return {**result, "wall": seconds, "cpu": cpu, "peak_mb": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--per-file", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the files are written (and removed), default a temporary folder")
    options = parser.parse_args()
    for pairs in options.pairs:
        root = tempfile.mkdtemp(prefix="selection-speed-", dir=options.folder)
        try:
            write_scores(RunFolder(root), pairs, options.per_file)
            ours, theirs = [], []
            for _ in range(options.repeats):
                ours.append(measured(cut, root))
                theirs.append(measured(cut_duckdb, root))
            best, other = (min(runs, key=lambda run: run["wall"]) for runs in (ours, theirs))
            # Where all tied pairs are kept our boundary has no uid of its own (all f): DuckDB's is then the last one.
            same = all(best[name] == other[name] for name in ("kept", "threshold"))
            same = same and best["uid"] in (other["uid"], "f" * 32)
            written = measured(write, root)
            print(
                json.dumps(
                    {
                        "pairs": pairs,
                        "same_answer": same,
                        "cut_seconds": [round(run["wall"], 2) for run in ours],
                        "duckdb_seconds": [round(run["wall"], 2) for run in theirs],
                        "cut_cpu_seconds": round(min(run["cpu"] for run in ours), 2),
                        "duckdb_cpu_seconds": round(min(run["cpu"] for run in theirs), 2),
                        "ratio_to_duckdb": round(best["wall"] / other["wall"], 2),
                        "cut_peak_mb": round(max(run["peak_mb"] for run in ours)),
                        "duckdb_peak_mb": round(max(run["peak_mb"] for run in theirs)),
                        "write_seconds": written["seconds"],
                        "write_rows_per_second": round(written["kept"] / written["seconds"]["writing keep lists"]),
                        "write_peak_mb": round(written["peak_mb"]),
                        "bytes": sum(path.stat().st_size for path in Path(root, "scores").iterdir()),
                    }
                ),
                flush=True,
            )
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
