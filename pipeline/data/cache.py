"""Decoded pairs in a local folder, memory-mapped: what is trained on or evaluated again and again is decoded once.

Arrays grow shard by shard, each shard noted in `progress.json` after its rows are on disk; an interrupted build goes
on behind the last noted shard. `cache.json` is written last and holds what the rows were made from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.decode import Decoder
from pipeline.data.inventory import ShardInfo
from pipeline.data.positions import Positions, by_shard, offsets
from pipeline.data.samples import Places, samples_at
from pipeline.errors import InputError
from pipeline.store import storage
from pipeline.types import PairBatch

#: Of what the arrays hold.
_VERSION = 2

#: Samples decoded at a time while building: bounds the memory.
CHUNK = 1024

_TYPES = {"images": np.uint8, "tokens": np.int32, "ids": np.int64, "captions": np.int64, "positions": np.int64}
#: A text whose tokens stand for the tokenizer in a cache's fingerprint.
_PROBE = "A photo of 3 Äpfel, a dog & the №7 tram."


class PairCache:
    """The pairs of a finished cache, in the order of their positions.

    Attributes:
        positions: int64 `[n]`, the global position of each pair in the inventory.
        ids: int64 `[n]`, the id of each pair.
    """

    def __init__(self, folder: str, rows: int, shapes: dict[str, list[int]]) -> None:
        self._arrays = {name: _map(folder, name, rows, shapes[name]) for name in _TYPES}
        self.positions: Positions = self._arrays["positions"]
        self.ids: NDArray[np.int64] = self._arrays["ids"]

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, rows: NDArray[np.int64]) -> PairBatch:
        """The pairs at those rows, in that order, copied to memory."""
        images, tokens, ids, captions = (
            torch.from_numpy(np.ascontiguousarray(self._arrays[name][rows])) for name in tuple(_TYPES)[:4]
        )
        return PairBatch(images, tokens.long(), ids, captions)


def build_cache(
    folder: str,
    inventory: Sequence[ShardInfo],
    decoder: Decoder,
    caption: str,
    positions: Positions | None = None,
    threads: int = 1,
    tell: Callable[[int], None] = lambda rows: None,
    places: Places | None = None,
) -> PairCache:
    """Decode the pairs at `positions` (all, if None) into `folder`; bad ones are left out, the rest are sorted.

    Goes on where an interrupted call stopped, opens what is complete, and starts anew where the folder was made from
    other shards, positions or preprocessing, or where rows that it has noted are not there. One process at a time
    builds a folder. `tell` is called with the pairs decoded so far, every `CHUNK` samples; `places` as for
    `samples_at`.
    """
    wanted = np.arange(offsets(inventory)[-1]) if positions is None else np.unique(np.asarray(positions, np.int64))
    fingerprint = _fingerprint(inventory, decoder, caption, wanted)
    shapes = _shapes(decoder)
    done, progress = (_read(folder, name) for name in ("cache.json", "progress.json"))
    if done.get("fingerprint") == fingerprint and _are_there(folder, done["rows"], shapes):
        return open_cache(folder)
    storage.remove(storage.join(folder, "cache.json"))
    if progress.get("fingerprint") != fingerprint or not _are_there(folder, progress["rows"], shapes):
        storage.remove(storage.join(folder, "progress.json"))
        progress = {"fingerprint": fingerprint, "shards": 0, "rows": 0}
    storage.make_folder(folder)
    files = {name: _open_at(folder, name, progress["rows"] * _row_bytes(name, shapes)) for name in _TYPES}
    try:
        for number, (info, start, indices) in enumerate(by_shard(inventory, wanted)):
            if number < progress["shards"]:
                continue
            samples = samples_at(info, indices, caption, places)
            rows = progress["rows"]
            while (decoded := decoder.decode_shard(islice(samples, CHUNK), threads)).rows:
                good = [decoded.rows[place].index for place in decoded.ok]
                batch = decoded.batch
                columns = {name: getattr(batch, name).numpy() for name in batch.__slots__}
                columns["positions"] = start + np.asarray(good, np.int64)
                for name, file in files.items():
                    file.write(np.ascontiguousarray(columns[name], dtype=_TYPES[name]).data)
                rows += len(batch)
                tell(rows)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            progress = {"fingerprint": fingerprint, "shards": number + 1, "rows": rows}
            storage.write_json(storage.join(folder, "progress.json"), progress)
    finally:
        for file in files.values():
            file.close()
    done = {"fingerprint": fingerprint, "rows": progress["rows"], "shapes": shapes}
    storage.write_json(storage.join(folder, "cache.json"), done)
    return open_cache(folder)


def open_cache(folder: str) -> PairCache:
    """Open a finished cache. Raises `InputError` where there is none."""
    done = _read(folder, "cache.json")
    if not done:
        raise InputError(f"{folder}: expected a finished cache of decoded pairs")
    return PairCache(folder, done["rows"], done["shapes"])


def _fingerprint(inventory: Sequence[ShardInfo], decoder: Decoder, caption: str, wanted: Positions) -> str:
    parts: list[Any] = [
        _VERSION,
        [[info.url, info.samples, info.bytes, info.etag] for info in inventory],
        asdict(decoder.spec),
        decoder.max_pixels,
        *(() if decoder.draft is None else (decoder.draft,)),
        decoder.tokenize([_PROBE]).tolist(),
        caption,
        storage.checksum(wanted.tobytes()),
    ]
    return storage.checksum(repr(parts).encode())


def _shapes(decoder: Decoder) -> dict[str, list[int]]:
    """The shape of one row of each array."""
    empty = decoder.decode_shard([]).batch
    shapes = {name: list(getattr(empty, name).shape[1:]) for name in empty.__slots__}
    return {**shapes, "positions": []}


def _row_bytes(name: str, shapes: dict[str, list[int]]) -> int:
    return int(np.prod(shapes[name], dtype=np.int64)) * np.dtype(_TYPES[name]).itemsize


def _are_there(folder: str, rows: int, shapes: dict[str, list[int]]) -> bool:
    """Whether every array's file has these rows at least: a cleaner of old files may have taken some of them."""
    files = {name: _file(folder, name) for name in _TYPES}
    return not rows or all(
        file.exists() and file.stat().st_size >= rows * _row_bytes(name, shapes) for name, file in files.items()
    )


def _file(folder: str, name: str) -> Path:
    return Path(storage.local_path(folder)) / f"{name}.bin"


def _open_at(folder: str, name: str, size: int) -> Any:
    """The array's file, cut to the `size` bytes that are known to be good, ready to append."""
    path = _file(folder, name)
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _map(folder: str, name: str, rows: int, shape: list[int]) -> NDArray[Any]:
    if rows == 0:
        return np.empty((0, *shape), _TYPES[name])
    return np.memmap(_file(folder, name), dtype=_TYPES[name], mode="r", shape=(rows, *shape))


def _read(folder: str, name: str) -> dict[str, Any]:
    """A JSON file of the folder; {} where it is missing or broken."""
    try:
        value = storage.read_json(storage.join(folder, name))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
