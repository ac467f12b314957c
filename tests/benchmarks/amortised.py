"""Amortised against full scoring on CIFAR-10N: `python -m tests.benchmarks.amortised [SHARE ...] [--model M]`.

One proxy run of 5 checkpoints, Eq. 9 (`diff-in`). For full scoring and for each share that is sampled, by the score
stage itself: seconds of the stage (start of the workers and the fit included), seconds that the workers then were at
it, and how many times faster both are than full scoring. Then, from the full scores and embeddings, for ten draws of
each share: the rank correlation stated and the true one, and the AUROC for wrong captions (`truth.csv`, for judging
only) with its distance from chance as a share of full scoring's. $DIFFPRUNE_TEST_DATA names the folder of the pairs.

With `--folder` the run is kept and found again; `--prepare` ends before scoring. `--model` is a proxy of
`proxy.model`; `bench-resnet` is `tiny-resnet` at 64 px and of 24 channels.
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
import pyarrow as pa
import torch

from pipeline.config import Config, parse_config
from pipeline.engine.connect import connect
from pipeline.engine.sample import observed
from pipeline.evaluation.correlation import spearman
from pipeline.evaluation.cross_fit import cross_fit
from pipeline.evaluation.quality import auroc, read_truth
from pipeline.run import RunFolder
from pipeline.selection.standardise import terms_matrix
from pipeline.stages.runner import run_stage
from pipeline.store.commits import open_scores, read_marks
from tests.benchmarks.needs import real_pairs

SHARES = [0.01, 0.02, 0.05, 0.1]
#: Draws of the sample per share.
DRAWS = 10
WORKERS = 2
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 24, "head_width": 48, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def config_of(data: Path, folder: Path, model: str) -> Config:
    """The run that is scored in full."""
    if model == "bench-resnet":
        path = folder / "bench-resnet.json"
        path.write_text(json.dumps(RESNET))
        model = str(path)
    return parse_config(
        {
            "out": str(folder / "run"),
            "data": {"shards": str(data / "cifar10n-train/*.tar.gz")},
            "target": {"kind": "shards", "shards": str(data / "cifar10-test/0000{0,1}.tar.gz"), "pairs": 1024},
            "reference": {"pairs": 128, "gradient_pairs": 512, "equal_captions": "ignore"},
            "proxy": {"model": model, "steps": 400, "batch_size": 128, "lr": 2e-3, "num_checkpoints": 5},
            "score": {"estimator": "diff-in", "embeddings": True},
            "engine": {"workers": WORKERS},
        }
    )


def score(config: Config) -> tuple[float, float, pa.Table]:
    """Run the score stage anew: its seconds, those that the workers were at it, and the scores by uid."""
    folder = RunFolder(config.out)
    for name in (folder.scores, folder.sample):
        shutil.rmtree(name, ignore_errors=True)
    with connect(config.engine):
        start = time.monotonic()
        run_stage("score", config)
        seconds = time.monotonic() - start
    marks = [*read_marks(folder), *read_marks(RunFolder(folder.sample))]
    # From the moment that a worker is ready it either waits for a shard or works on one.
    work = sum(mark.seconds["waiting"] + mark.seconds["score"] for mark in marks) / WORKERS
    return seconds, work, open_scores(folder).to_table().sort_by("uid").combine_chunks()


def sampled(config: Config, share: float) -> Config:
    """The same run with a share sampled."""
    values: dict[str, Any] = {"sample": share, "min_correlation": 0.0}
    return config.model_copy(update={"score": config.score.model_copy(update=values)})


def simulate(table: pa.Table, wrong: np.ndarray, share: float) -> None:
    """Fit on samples of pairs that were all scored, and judge what is predicted for the others."""
    runs = np.zeros(len(table["terms"][0].as_py()), np.int64)
    seen = observed(table, np.arange(len(table)), runs)
    terms = torch.from_numpy(terms_matrix(table["terms"].combine_chunks(), runs))
    full = terms.sum(1).numpy()
    rows = []
    for seed in range(DRAWS):
        draws = torch.rand(len(table), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / share
        chosen = draws < 1
        regressor, found = cross_fit(seen[chosen], terms[chosen], runs.tolist(), draws[chosen], share=share, seed=seed)
        predicted = regressor.predict(seen).sum(1).numpy()
        new = ~chosen.numpy()
        value = auroc(-np.where(new, predicted, full), wrong)
        distance = (value - 0.5) / (auroc(-full, wrong) - 0.5)
        rows.append((found.curve[-1].correlation, spearman(predicted[new], full[new]), value, distance))
    spans = []
    for name, values in zip(
        ("stated", "true", "AUROC", "of the distance from chance"), np.transpose(rows), strict=True
    ):
        spans.append(f"{name} {values.mean():.3f} ({values.min():.3f} to {values.max():.3f})")
    print(f"{share:.0%}, {DRAWS} draws: rank correlation {', '.join(spans)}", flush=True)


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--model", default="bench-resnet")
    parser.add_argument("--prepare", action="store_true")
    given = parser.parse_args()
    data = real_pairs()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(data, folder, given.model)
        for stage in ("inventory", "train", "directions"):
            run_stage(stage, config)
        if not given.prepare:
            measure(config, data, given.shares)


def measure(config: Config, data: Path, shares: list[float]) -> None:
    """Score in full and with each share, and print a line for each."""
    truth = read_truth(str(data / "cifar10n-train/truth.csv"))
    stage, work, table = score(config)
    pairs = len(table)
    wrong = np.array([truth[uid] for uid in table["uid"].to_pylist()])
    value = auroc(-table["score"].to_numpy(), wrong)
    print(f"full: stage {stage:.1f} s, at work {work:.1f} s, {pairs / work:.0f} pairs/s, AUROC {value:.4f}", flush=True)
    for share in shares:
        again, at_work, part = score(sampled(config, share))
        value = auroc(-part["score"].to_numpy(), wrong)
        print(
            f"{share:.0%}: stage {again:.1f} s, {stage / again:.1f} times; at work {at_work:.1f} s, "
            f"{pairs / at_work:.0f} pairs/s, {work / at_work:.1f} times; AUROC {value:.4f}",
            flush=True,
        )
    for share in shares:
        simulate(table, wrong, share)


if __name__ == "__main__":
    main()
