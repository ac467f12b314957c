"""What a selection costs on finished scores: seconds per million pairs of each policy, quota and kind of duplicate.

    python -m tests.benchmarks.policies_speed --pairs 200000 [--run RUN]

The scores are those of `dedup_speed`, with 512-dimensional embeddings. Each selection is a whole one, keep lists
included, of 30 % of the pairs. Prints one JSON line per selection: seconds and CPU seconds per million pairs, and the
peak memory so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import SelectConfig
from pipeline.run import RunFolder
from pipeline.selection.select import select
from pipeline.selection.tasks import thread_map
from tests.benchmarks.dedup_speed import embeddings, run_base, synthetic_base, write_scores

SELECTIONS: dict[str, dict[str, Any]] = {
    "rank": {},
    "rank by a formula of ranks": {"by": "rank(utility) + 0.5 * rank(similarity)", "where": "width > 60"},
    "threshold": {"keep": {"threshold": 0.5}},
    "band": {"keep": {"drop_highest": 0.05, "drop_lowest": 0.65}},
    "significant, random fill": {"policy": "significant"},
    "significant, representative": {"policy": "significant", "fill": "representative"},
    "significant, diverse": {"policy": "significant", "fill": "diverse"},
    "balance by caption": {"balance": {"by": "caption"}},
    "balance by cluster": {"balance": {"by": "cluster"}},
    "infomax": {"policy": "infomax"},
    "exact duplicates": {"dedup": {"exact": True}},
    "near-duplicates": {"dedup": {"cosine": 0.95}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--run", help="folder of a finished run whose embeddings are the base set")
    parser.add_argument("--folder", help="where the files are written (and removed), default a temporary folder")
    options = parser.parse_args()
    root = tempfile.mkdtemp(prefix="policies-speed-", dir=options.folder)
    try:
        run, rng = RunFolder(root), np.random.default_rng(0)
        base = run_base(RunFolder(options.run)) if options.run else synthetic_base(rng)
        write_scores(run, embeddings(base, rng, options.pairs, 0.95), rng)
        for name, section in SELECTIONS.items():
            config = SelectConfig.model_validate({"keep": 0.3, **section})
            start, cpu = time.perf_counter(), time.process_time()
            select(run, config, seed=0, map_tasks=thread_map)
            million = options.pairs / 1e6
            line = {
                "selection": name,
                "seconds_per_million": round((time.perf_counter() - start) / million, 1),
                "cpu_seconds_per_million": round((time.process_time() - cpu) / million, 1),
                "peak_mb": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024,
            }
            print(json.dumps(line), flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
