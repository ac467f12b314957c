"""Demonstration data: scikit-learn's 1,797 scans of handwritten digits as image-text shards, some captions wrong.

Which captions are wrong is written to `truth.csv`, for judging a pruning only; the pipeline never reads it.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.store import storage

#: Scans in all.
SCANS = 1797
#: Scans in the held-out target part and in the held-out test part; the others are for training.
TARGET, TEST = 200, 400
#: Pairs per shard.
SHARD = 200
#: Side of the written images in pixels (the scans have 8).
SIDE = 32

#: Shards of the training part.
_SHARDS = -(-(SCANS - TARGET - TEST) // SHARD)

_VERSION = 1
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PHRASES = (
    "a handwritten digit {name}",
    "a scan of a handwritten {name}",
    "the number {name}, written by hand",
    "someone wrote a {name} on paper",
    "a {name} in pencil",
    "a blurry picture of the digit {name}",
    "the digit {name} from a postal form",
    "handwriting: the number {name}",
)


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Where the demo data are.

    Attributes:
        train: shard pattern of the training pairs, a share of them with wrong captions.
        target: shard pattern of held-out pairs with right captions.
        test: shard pattern of other held-out pairs, one caption per class, with `label` in the json.
        truth: CSV of uid, clean (the digit that is shown), caption_class (the digit that the caption names).
    """

    train: str
    target: str
    test: str
    truth: str


def demo_paths(folder: str) -> DemoPaths:
    """Where `make_demo` puts the demo data below `folder`."""
    return DemoPaths(
        train=storage.join(folder, "train", f"{{00000..{_SHARDS - 1:05d}}}.tar"),
        target=storage.join(folder, "target", "00000.tar"),
        test=storage.join(folder, "test", "00000.tar"),
        truth=storage.join(folder, "truth.csv"),
    )


def make_demo(folder: str, seed: int = 0, wrong_share: float = 0.3) -> DemoPaths:
    """Write the demo data to a local folder, unless they are there already, and say where.

    Equal arguments give equal bytes. Raises `ConfigError` when scikit-learn is not installed.
    """
    paths = demo_paths(folder)
    mark = {"version": _VERSION, "seed": seed, "wrong_share": wrong_share, "pairs": SCANS}
    if _mark(folder) == mark:
        return paths
    scans, digits = _digits()
    storage.remove(storage.join(folder, "demo.json"))
    order = np.random.default_rng(seed).permutation(SCANS)
    train_rows, target_rows, test_rows = np.split(order, [-(TARGET + TEST), -TEST])
    rng = np.random.default_rng([seed, 1])
    named = _wrong_captions(digits[train_rows], wrong_share, rng)
    for number in range(_SHARDS):
        part = slice(number * SHARD, (number + 1) * SHARD)
        pairs = (
            _Pair(row, scans[row], _phrase(name, rng), None)
            for row, name in zip(train_rows[part], named[part], strict=True)
        )
        _write_tar(storage.join(folder, "train", f"{number:05d}.tar"), pairs)
    held_out = (_Pair(row, scans[row], _phrase(digits[row], rng), None) for row in target_rows)
    _write_tar(paths.target, held_out)
    _write_tar(paths.test, (_Pair(row, scans[row], _phrase(digits[row]), int(digits[row])) for row in test_rows))
    _write_truth(paths.truth, train_rows, digits, named)
    storage.write_json(storage.join(folder, "demo.json"), mark)
    return paths


@dataclass(frozen=True, slots=True)
class _Pair:
    row: int
    scan: NDArray[np.float64]
    caption: str
    label: int | None


def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The scans, float64 `[1797, 8, 8]` in [0, 16], and the digits they show, int64 `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the demo data need scikit-learn: pip install '.[demo]'") from None
    bunch = load_digits()
    return np.asarray(bunch.images, np.float64), np.asarray(bunch.target, np.int64)


def _wrong_captions(digits: NDArray[np.int64], share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """The digits that captions name: for exactly the rounded share of the pairs another one than is shown."""
    named = digits.copy()
    wrong = rng.choice(len(digits), size=round(share * len(digits)), replace=False)
    named[wrong] = (digits[wrong] + rng.integers(1, 10, size=len(wrong))) % 10
    return named


def _phrase(digit: int, rng: np.random.Generator | None = None) -> str:
    """A caption that names a digit: a random phrase, or without `rng` the first."""
    phrase = _PHRASES[0 if rng is None else rng.integers(len(_PHRASES))]
    return phrase.format(name=_NAMES[digit])


def _uid(row: int) -> str:
    return storage.checksum(f"digits/{row}".encode())


def _image(scan: NDArray[np.float64]) -> bytes:
    grey = Image.fromarray((255 - scan * (255 / 16)).round().astype(np.uint8))
    buffer = io.BytesIO()
    grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _members(pair: _Pair) -> Iterator[tuple[str, bytes]]:
    key = f"{pair.row:08d}"
    meta: dict[str, Any] = {"uid": _uid(pair.row)}
    if pair.label is not None:
        meta["label"] = pair.label
    yield f"{key}.jpg", _image(pair.scan)
    yield f"{key}.txt", pair.caption.encode()
    yield f"{key}.json", json.dumps(meta).encode()


def _write_tar(path: str, pairs: Iterable[_Pair]) -> None:
    with storage.atomic_writer(path) as handle, tarfile.open(fileobj=handle, mode="w") as tar:
        for pair in pairs:
            for name, content in _members(pair):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def _write_truth(path: str, rows: NDArray[np.int64], digits: NDArray[np.int64], named: NDArray[np.int64]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["uid", "clean", "caption_class"])
    table.writerows([_uid(row), _NAMES[digits[row]], _NAMES[name]] for row, name in zip(rows, named, strict=True))
    storage.write_bytes(path, text.getvalue().encode())


def _mark(folder: str) -> Any:
    """What the folder's complete demo data were made with; None where there are none."""
    try:
        return storage.read_json(storage.join(folder, "demo.json"))
    except (FileNotFoundError, ValueError):
        return None
