"""Plans against runs: `python -m tests.benchmarks.plans [demo] [SET ...]`, sets of `real_runs` with real pairs.

For each, `diffprune plan` and then the run itself, in processes of their own; prints the seconds of each stage as
planned and as taken. $DIFFPRUNE_TEST_DATA names the folder of the real pairs. Peak memory and storage likewise.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks import real_runs
from tests.benchmarks.needs import real_pairs

ROOT = Path(__file__).resolve().parents[2]
#: What a plan's storage of each stage is compared with: files below the run's folder.
STORED = {"train": ("checkpoints", "cache"), "directions": ("directions",), "score": ("scores", "sample")}


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """The config of `demo`, without its evaluation, or of a set of real pairs."""
    if name != "demo":
        return real_runs.config_of(name, real_pairs(), folder / name)
    tree: dict[str, Any] = yaml.safe_load((ROOT / "jobs/configs/demo.yaml").read_text())
    del tree["evaluate"]
    return {**tree, "out": str(folder / name)}


def plan(config: Path) -> dict[str, Any]:
    """What `diffprune plan --json` prints."""
    command = [sys.executable, "-m", "pipeline.cli", "plan", str(config), "--json"]
    found: dict[str, Any] = json.loads(subprocess.check_output(command))
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Plan and run what is named on the command line, or the demo and all sets."""
    chosen = real_runs.names(__doc__, ["demo", *real_runs.SETS])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in chosen:
            file = folder / f"{name}.yaml"
            file.write_text(yaml.safe_dump(config_of(name, folder)))
            planned = {stage["stage"]: stage for stage in plan(file)["stages"]}
            summary = real_runs.run(file, folder / name)
            took = {stage: summary["seconds"].get(stage, 0.0) for stage in planned}
            print(f"{name}: exit status {summary['status']}")
            for stage, seconds in [*took.items(), ("all", sum(took.values()))]:
                expected = sum(s["seconds"] for s in planned.values()) if stage == "all" else planned[stage]["seconds"]
                ratio = f"{expected / seconds:.2f}" if seconds >= 1 else "-"
                print(f"  {stage:11} planned {expected:7.1f} s, took {seconds:7.1f} s, ratio {ratio}")
            for stage, parts in STORED.items():
                stored = sum(size_of(folder / name / part) for part in parts)
                print(f"  {stage:11} planned {planned[stage]['storage'] / 1e6:7.1f} MB, stored {stored / 1e6:7.1f} MB")
            worker = summary["peak"]["worker"] / 2**20
            memory = max(stage["memory"] for stage in planned.values())
            print(f"  memory      planned {memory / 2**20:7.0f} MiB, largest worker {worker:7.0f} MiB")


if __name__ == "__main__":
    main()
