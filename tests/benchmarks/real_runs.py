"""The whole job on real pairs: `python -m tests.benchmarks.real_runs [NAME ...]` with $DIFFPRUNE_TEST_DATA set.

Prints per data set the pairs in, kept and rejected, the pairs per second of each stage, the peak memory of all
processes, and for cifar10n-train how well scores find the wrong captions (`truth.csv`, for judging only).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.benchmarks.needs import real_pairs

#: What differs from the config below.
SETS: dict[str, dict[str, Any]] = {
    "flickr1k": {"shards": "flickr1k/*.tar", "proxy": {"model": "tiny-vit", "steps": 200, "batch_size": 64}},
    "emoji": {"shards": "emoji/*.tar", "proxy": {"model": "tiny-vit", "steps": 200, "batch_size": 64}},
    "imagenet-mixed": {
        "shards": "imagenet-mixed/*.tar",
        "proxy": {"model": "tiny-vit", "steps": 200, "batch_size": 64},
    },
    "cifar10n-train": {
        "shards": "cifar10n-train/*.tar.gz",
        "target": {"kind": "shards", "shards": "cifar10-test/0000{0,1}.tar.gz", "pairs": 1024},
        "proxy": {"model": "tiny-resnet", "steps": 400, "batch_size": 128, "lr": 2e-3},
    },
}


def config_of(name: str, data: Path, out: Path) -> dict[str, Any]:
    """The config of one data set, as YAML would hold it."""
    own = SETS[name]
    target = {"kind": "holdout", "pairs": 128, **own.get("target", {})}
    if "shards" in target:
        target["shards"] = str(data / target["shards"])
    tree: dict[str, Any] = {
        "out": str(out),
        "data": {"shards": str(data / own["shards"])},
        "target": target,
        "reference": {"pairs": 128, "gradient_pairs": 512, "equal_captions": "ignore"},
        "proxy": {"num_checkpoints": 4, "lr": 1e-3, **own["proxy"]},
        "select": {"keep": 0.7},
        "emit": {"materialize": True, "pairs_per_shard": 500},
    }
    if name == "cifar10n-train":
        tree["evaluate"] = {"truth": str(data / name / "truth.csv")}
    return tree


def run(config: Path, folder: Path) -> dict[str, Any]:
    """Run the job of a config file in processes of its own, and read off what it says of itself in its folder."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pipeline.cli", "run", str(config)])
    peak = {"driver": 0, "worker": 0, "all": 0}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done))
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    summary = json.loads((folder / "summary.json").read_text())
    return {"status": status, "total": time.monotonic() - start, "peak": peak, **summary}


def _watch(pid: int, peak: dict[str, int], done: threading.Event) -> None:
    while not done.wait(0.5):
        try:
            driver = psutil.Process(pid)
            own = driver.memory_info().rss
            others = [child.memory_info().rss for child in driver.children(recursive=True) if _is_worker(child)]
        except psutil.Error:
            continue
        peak["driver"] = max(peak["driver"], own)
        peak["worker"] = max(peak["worker"], *others, 0)
        peak["all"] = max(peak["all"], own + sum(others))


def _is_worker(process: psutil.Process) -> bool:
    return process.name().startswith("ray::")


def names(doc: str | None, choices: list[str]) -> list[str]:
    """The names given on the command line, or all of `choices`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(choices))
    given: list[str] = parser.parse_args().names
    if unknown := set(given) - set(choices):
        parser.error(f"expected names out of {', '.join(choices)}, found {', '.join(sorted(unknown))}")
    return given or choices


def main() -> None:
    """Run the sets named on the command line, or all."""
    chosen = names(__doc__, list(SETS))
    data = real_pairs()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            config = Path(folder, f"{name}.yaml")
            config.write_text(yaml.safe_dump(config_of(name, data, Path(folder, name))))
            found = run(config, Path(folder, name))
            counts, pairs = found["counts"], found["counts"]["in"]
            stages = ", ".join(
                f"{stage} {pairs / max(value, 0.01):,.0f}/s" for stage, value in found["seconds"].items()
            )
            print(f"{name}: exit status {found['status']}, {found['total']:.0f} s")
            print(f"  {pairs:,} in, {counts['kept']:,} kept, {counts['pruned']:,} pruned")
            print(f"  rejected: {counts['rejected_by_reason'] or 'none'}")
            print(f"  pairs per second: {stages}")
            print(
                "  peak memory: " + ", ".join(f"{who} {value / 2**20:,.0f} MiB" for who, value in found["peak"].items())
            )
            for column, quality in found.get("quality", {}).get("by", {}).items():
                print(f"  wrong captions by {column}: AUROC {quality['auroc']:.3f}")


if __name__ == "__main__":
    main()
