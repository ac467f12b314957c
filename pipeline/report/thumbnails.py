"""The images and captions of a few pairs, fetched from their input shards and made small for the page."""

from __future__ import annotations

import base64
import io
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.inventory import ShardInfo
from pipeline.data.reader import read_shard
from pipeline.errors import DiffpruneError

#: Longest side of a thumbnail, pixels: sharp at card size on screens of two pixels per point.
SIDE = 224
READERS = 4


@dataclass(frozen=True)
class Content:
    """What a shard holds of a pair: the image as stored (None without one) and its caption."""

    image: bytes | None
    caption: str


def fetch(positions: Iterable[tuple[int, int]], shards: list[ShardInfo], data: DataConfig) -> dict[
    tuple[int, int], Content
]:  # fmt: skip
    """Contents of the pairs at `(shard, index)`; each shard is read once, up to the last pair wanted.

    Pairs of a shard that cannot be read any more are left out.
    """
    wanted: dict[int, set[int]] = defaultdict(set)
    for shard, index in positions:
        wanted[shard].add(index)
    urls = {info.index: info.url for info in shards}

    def read(shard: int) -> dict[tuple[int, int], Content]:
        found = {}
        last = max(wanted[shard])
        try:
            with read_shard(urls[shard], caption=data.caption) as reader:
                for sample in reader:
                    if sample.index in wanted[shard]:
                        found[shard, sample.index] = Content(sample.image, sample.caption or "")
                    if sample.index >= last:
                        break
        except (OSError, DiffpruneError):
            pass  # the input may have moved since it was scored: the page then shows the pairs without pictures
        return found

    contents: dict[tuple[int, int], Content] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(read, sorted(wanted)):
            contents.update(found)
    return contents


def open_image(data: bytes, max_pixels: int, side: int) -> Image.Image | None:
    """The image in RGB, at most `side` pixels long; None where it cannot be decoded or has too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                return None
            image.draft("RGB", (side, side))
            image.thumbnail((side, side))
            if image.mode.startswith("I"):  # 16-bit greyscale: `convert` would clip it to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception:
        # Decoders raise nearly anything on broken files, and a broken picture is no reason to have no page.
        return None


def data_uri(image: Image.Image) -> str:
    """The image as a WebP data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=74, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
