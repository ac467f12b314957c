"""Real shards in every format: nothing is lost, and pixels are those of open_clip."""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

import pipeline.models.compat  # noqa: F401  (before open_clip)
from pipeline.data.decode import Decoder, ImageSpec
from pipeline.data.inventory import inspect_shard
from pipeline.data.reader import read_shard
from pipeline.data.shards import expand
from tests.helpers import ByteTokenizer

pytestmark = pytest.mark.realdata

SPEC = ImageSpec((64, 64), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "shards", "samples"),
    [
        ("imagenet-mixed", 4, 1000),
        ("emoji", 4, 1644),
        ("flickr1k", 4, 1000),
        ("cifar10n-train", 10, 10_000),
        ("cifar10-test", 10, 10_000),
    ],
)
def test_counts(real_data: Path, name: str, shards: int, samples: int) -> None:
    infos = [inspect_shard(index, url) for index, url in enumerate(expand(f"{real_data}/{name}/*"))]
    assert len(infos) == shards
    assert sum(info.samples for info in infos) == samples
    assert {info.end_error for info in infos} == {""}


@pytest.mark.parametrize("name", ["imagenet-mixed", "emoji", "flickr1k", "cifar10n-train"])
def test_every_pair_decodes_and_pixels_are_those_of_open_clip(real_data: Path, name: str) -> None:
    import open_clip

    url = expand(f"{real_data}/{name}/*")[0]
    samples = list(read_shard(url))
    decoded = Decoder(SPEC, ByteTokenizer(), 64_000_000).decode_shard(samples, threads=2)
    assert Counter(row.status for row in decoded.rows) == {"ok": len(samples)}
    assert len({row.uid for row in decoded.rows}) == len(samples)
    assert all(row.uid == (sample.meta or {})["uid"] for row, sample in zip(decoded.rows, samples, strict=True))
    transform = open_clip.image_transform(SPEC.size, is_train=False, mean=SPEC.mean, std=SPEC.std)
    modes = set()
    for place in range(0, len(samples), 7):
        with Image.open(BytesIO(samples[place].image or b"")) as image:
            modes.add(image.mode)
            pixels = (transform(image) * 255).round().to(torch.uint8)
        assert torch.equal(decoded.batch.images[place], pixels)
    assert "RGBA" in modes or name != "emoji"


def test_greyscale_is_among_them(real_data: Path) -> None:
    modes: Counter[str] = Counter()
    for url in expand(f"{real_data}/imagenet-mixed/*"):
        for sample in read_shard(url):
            with Image.open(BytesIO(sample.image or b"")) as image:
                modes[image.mode] += 1
    assert modes["L"] > 0
    assert sum(modes.values()) == 1000


def test_caption_from_a_list_in_the_json_is_refused_with_a_reason(real_data: Path) -> None:
    with read_shard(expand(f"{real_data}/flickr1k/*")[0], caption="json:captions") as reader:
        samples = list(reader)
    assert {sample.status for sample in samples} == {"no-caption"}
    assert "list" in samples[0].error
