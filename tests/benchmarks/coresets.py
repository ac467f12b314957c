"""Coreset curves: 10, 30, 50 and 70 % of CIFAR-10N by every estimator, alone, and what a model learns from it.

    python -m tests.benchmarks.coresets [--only NAME ...] [--folder FOLDER] [--seeds 3] [--set a.b=c ...]

One proxy run; every estimator scores all pairs with its checkpoints (`NAME-margin` with `target.loss: margin`); then
models are trained anew on what each would keep, the same share of each caption, at equal steps. Prints the table of
accuracies on test photos that were no target, and how well each estimator finds the wrong captions (`truth.csv` of
`cifar10n-train`, for judging only). `$DIFFPRUNE_TEST_DATA` names the folder of the pairs. What is in FOLDER already is
not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.evaluation.quality import auroc, read_truth
from pipeline.run import RunFolder
from pipeline.store.commits import open_scores
from tests.benchmarks.needs import real_pairs

#: Estimators beside `clip-score`, whose run trains the proxy, and what their configs add. The sizes of the projected
#: forms keep them affordable; docs/validation.md has their rank correlations with the exact forms.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "diff-in": {},
    "tracin": {},
    "unrolled": {},
    "moso": {},
    "z0": {},
    "neg-clip-loss": {},
    "el2n": {},
    "grand": {"projections": 16},
    "tracin-self": {"projections": 16},
    "diff-in-self": {"projections": 16, "eigenpairs": 4},
}
MARGIN = "-margin"
NAMES = [*ESTIMATORS, *(name + MARGIN for name in ("diff-in", "tracin", "unrolled", "z0"))]
KEEPS = [0.1, 0.3, 0.5, 0.7]


def config_of(data: Path, folder: Path, name: str) -> dict[str, Any]:
    """The run of one of `NAMES` or of `clip-score`, as YAML would hold it."""
    estimator = name.removesuffix(MARGIN)
    tree: dict[str, Any] = {
        "out": str(folder / name),
        "data": {"shards": str(data / "cifar10n-train/*.tar.gz")},
        "target": {"kind": "shards", "shards": str(data / "cifar10-test/0000{0,1}.tar.gz"), "pairs": 1024},
        "reference": {"pairs": 256, "gradient_pairs": 512, "equal_captions": "ignore"},
        "proxy": {"model": "tiny-resnet", "steps": 400, "batch_size": 128, "lr": 3e-3, "num_checkpoints": 4},
        "score": {"estimator": estimator, **ESTIMATORS.get(estimator, {})},
        "select": {"keep": 0.5, "balance": {"by": "caption"}},
        "report": {"gallery": 1},
    }
    if name.endswith(MARGIN):
        tree["target"]["loss"] = "margin"
    if name != "clip-score":
        tree["proxy"]["checkpoints"] = [str(folder / "clip-score/checkpoints/manifest.json")]
    return tree


def judging(data: Path, tree: dict[str, Any], folder: Path, names: list[str], seeds: int) -> dict[str, Any]:
    """The run of `clip-score` with a training on the choice of each of `names`."""
    return tree | {
        "select": tree["select"] | {"join": {name.replace("-", "_"): str(folder / name) for name in names}},
        "evaluate": {
            "shards": str(data / "cifar10-test/0000[2-9].tar.gz"),
            "truth": str(data / "cifar10n-train/truth.csv"),
            "seeds": seeds,
            "steps": 200,
            "keeps": KEEPS,
            "baselines": ["random", "right-only", "full"],
            "compare": {name: {"by": f"{name.replace('-', '_')}.utility"} for name in names},
        },
    }


def diffprune(command: str, tree: dict[str, Any], folder: Path, changes: list[str]) -> float:
    """Run a command of the package on a config in a process of its own; its seconds."""
    config = folder / f"{Path(tree['out']).name}-{command}.yaml"
    config.write_text(yaml.safe_dump(tree))
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "pipeline.cli", command, str(config), *changes], check=True)
    return time.monotonic() - start


def main() -> None:
    """Draw them in the folder given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    data = real_pairs()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        changes = [word for change in options.set for word in ("--set", change)]
        draw_curves(data, folder, options.only, options.seeds, changes)


def draw_curves(data: Path, folder: Path, names: list[str], seeds: int, changes: list[str]) -> None:
    """Score in every way, train on every choice, print the table."""
    for name in ("clip-score", *names):
        print(f"{name}: {diffprune('run', config_of(data, folder, name), folder, changes):.0f} s", flush=True)
    tree = judging(data, config_of(data, folder, "clip-score"), folder, names, seeds)
    print(f"trainings: {diffprune('evaluate', tree, folder, changes):.0f} s")
    rows = json.loads((folder / "clip-score/evaluation/results.json").read_text())["rows"]
    print_curves(rows)
    wrong = read_truth(str(data / "cifar10n-train/truth.csv"))
    for name in ("clip-score", *names):
        scores = open_scores(RunFolder(str(folder / name))).to_table(columns=["uid", "utility"])
        known = np.array([wrong[uid] for uid in scores["uid"].to_pylist()])
        print(f"{name}: AUROC for wrong captions {auroc(scores['utility'].to_numpy(), known):.3f}")


def print_curves(rows: list[dict[str, Any]]) -> None:
    """A line per series: mean and spread over the seeds at each size; sets that are no choice on lines of their own."""
    series: dict[str, list[str]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(f"{row['mean']:.3f} ± {row['std']:.3f}")
    print("| kept by | " + " | ".join(f"{keep:.0%}" for keep in KEEPS) + " |\n|" + "---|" * (len(KEEPS) + 1))
    for name, cells in series.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
