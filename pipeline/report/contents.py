"""The images and captions of a few pairs, fetched from their input shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.inventory import ShardInfo
from pipeline.data.samples import Places, samples_at
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


def fetch(
    pairs: Iterable[Place], shards: list[ShardInfo], data: DataConfig, places: Places | None = None
) -> dict[Place, Content]:
    """Contents of the pairs at `(shard, index)`.

    With `places` (`RunFolder.places`) what lies between them is not read, where the inventory kept where they lie; else
    a shard is read up to the last pair wanted. Pairs of a shard that cannot be read any more are left out.
    """
    infos = {info.index: info for info in shards}
    wanted: dict[int, set[int]] = defaultdict(set)
    for shard, index in pairs:
        if index < infos[shard].samples:
            wanted[shard].add(index)

    def read(shard: int) -> dict[Place, Content]:
        found = {}
        try:
            for sample in samples_at(infos[shard], np.array(sorted(wanted[shard])), data.caption, places):
                found[shard, sample.index] = Content(sample.image, sample.caption or "")
        except (OSError, DiffpruneError):
            pass  # the input may have moved since it was scored: the page then shows the pairs without pictures
        return found

    contents: dict[Place, Content] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(read, sorted(wanted)):
            contents.update(found)
    return contents
