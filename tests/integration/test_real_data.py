"""A small part of each real data set through the whole job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.emit.verify import verify
from pipeline.run import RunFolder
from pipeline.stages.runner import run_all
from tests.integration.runs import small_config

pytestmark = [pytest.mark.ray, pytest.mark.realdata]


@pytest.mark.parametrize(
    ("name", "pattern", "pairs"),
    [
        pytest.param("flickr1k", "00000.tar", 250, marks=pytest.mark.slow),
        ("emoji", "00003.tar", 144),
        ("imagenet-mixed", "00001.tar", 250),
        pytest.param("cifar10n-train", "00002.tar.gz", 1000, marks=pytest.mark.slow),
    ],
)
def test_a_shard_of_real_pairs_goes_through(
    real_data: Path, tmp_path: Path, ray_local: None, name: str, pattern: str, pairs: int
) -> None:
    target = {"pairs": 16}
    if name == "cifar10n-train":
        target |= {"kind": "shards", "shards": str(real_data / "cifar10-test" / "00000.tar.gz")}
    config = small_config(
        str(real_data / name / pattern),
        tmp_path / "run",
        target=target,
        reference={"pairs": 16, "gradient_pairs": 32, "equal_captions": "ignore"},
        emit={"pairs_per_shard": 100},
    )
    run_all(config)
    counts = json.loads(Path(RunFolder(config.out).summary).read_text())["counts"]
    assert counts["in"] == pairs
    assert counts["rejected"] == 0
    assert counts["kept"] == -(-pairs // 2)
    assert verify(config.out) == []
