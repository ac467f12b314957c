"""The images and captions of a few pairs, fetched from their input shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.config import DataConfig
from pipeline.data.inventory import ShardInfo
from pipeline.data.reader import read_shard
from pipeline.errors import DiffpruneError

#: Where a pair is: number of the shard, index in it.
Place = tuple[int, int]
#: Shards read at the same time.
READERS = 4


@dataclass(frozen=True)
class Content:
    """What a shard holds of a pair: the image as stored (None without one) and its caption."""

    image: bytes | None
    caption: str


def fetch(places: Iterable[Place], shards: list[ShardInfo], data: DataConfig) -> dict[Place, Content]:
    """Contents of the pairs at `(shard, index)`; each shard is read once, up to the last pair wanted.

    Pairs of a shard that cannot be read any more are left out.
    """
    wanted: dict[int, set[int]] = defaultdict(set)
    for shard, index in places:
        wanted[shard].add(index)
    urls = {info.index: info.url for info in shards}

    def read(shard: int) -> dict[Place, Content]:
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

    contents: dict[Place, Content] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(read, sorted(wanted)):
            contents.update(found)
    return contents
