"""From the start of `diffprune score` to the first scored pair: `python -m tests.benchmarks.start_up [--repeats 3]`.

cifar10n-train with tiny-resnet, 5 checkpoints of Eq. 9, weights and directions on disk. Prints for each repeat the
seconds until a worker has its first shard's pairs in the passes, and those of the whole stage. $DIFFPRUNE_TEST_DATA
names the folder of the real pairs.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import yaml

from pipeline.run import RunFolder
from tests.benchmarks import real_runs
from tests.benchmarks.ladder import first_scored, marks_of, stage
from tests.benchmarks.needs import real_pairs


def main() -> None:
    """Prepare the run, then score it some times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    data = real_pairs()
    with tempfile.TemporaryDirectory() as scratch:
        tree = real_runs.config_of("cifar10n-train", data, Path(scratch, "run"))
        tree["proxy"].update(num_checkpoints=5, steps=50)
        (config := Path(scratch, "config.yaml")).write_text(yaml.safe_dump(tree))
        for name in ("inventory", "train", "directions"):
            stage(name, config)
        folder = RunFolder(tree["out"])
        for _ in range(options.repeats):
            shutil.rmtree(folder.scores, ignore_errors=True)
            start = time.time()
            seconds = stage("score", config)
            first = first_scored(marks_of(folder)) - start
            print(f"first pairs in the passes after {first:.1f} s, stage {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
