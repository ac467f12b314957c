"""From samples to model inputs: images with open_clip's evaluation transform, captions as tokens.

The pixels are exactly those of `open_clip.image_transform(..., is_train=False)` before its normalisation (nearly those,
with `draft`), computed with Pillow alone: no torchvision in the workers. Like it, the first frame of an animation is
taken, EXIF orientation is left alone, and alpha is dropped after resizing.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.reader import Sample
from pipeline.data.reasons import Reason
from pipeline.pictures import FORMATS
from pipeline.types import PairBatch

#: Letters of a caption that are tokenized, far more than a model takes in: a word of n letters takes n² steps.
MOST_LETTERS = 8192
#: Bytes of encoded samples that wait for a thread, from which on no more are read.
WAITING_BYTES = 256 << 20

Tokenize = Callable[[list[str]], Tensor]
_Pixels = NDArray[np.uint8]
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ADDRESS = re.compile(r"\s*(?:<[^<>]* at )?0x[0-9a-fA-F]+>?")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What images a model takes; the fields mean what they mean in open_clip's preprocessing config.

    Attributes:
        size: height and width in pixels.
        mean: per channel, of pixels in [0, 1]; subtracted by the model.
        std: per channel; divided by in the model.
        interpolation: `bicubic` or `bilinear`.
        resize_mode: `shortest` (then cropped), `longest` (then padded) or `squash`.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


@dataclass(slots=True)
class Row:
    """What is known of a sample after decoding, good or bad.

    Attributes:
        uid, key, index, status, error: as in `Sample`, with what decoding found.
        width, height: pixels of the original image; 0 where unknown.
        caption_length: characters.
        source: the host of the URL at the configured json key, or its value; "" where there is none.
        content: BLAKE2b-128 hex digest of image bytes and caption; "" where either is missing.
        caption_id: `caption_id` of the caption; 0 where there is none.
    """

    uid: str
    key: str
    index: int
    status: str
    error: str
    width: int
    height: int
    caption_length: int
    source: str
    content: str
    caption_id: int


@dataclass(slots=True)
class DecodedShard:
    """Decoded samples: a row for each, and the good ones as a batch.

    Attributes:
        rows: one per sample, in order.
        batch: the pairs whose status is `ok`, in order.
        ok: int64 `[len(batch)]`, the place in `rows` of each pair of the batch.
    """

    rows: list[Row]
    batch: PairBatch
    ok: NDArray[np.int64]


class Decoder:
    """Decodes samples for one model.

    Args:
        spec: the images the model takes.
        tokenize: captions to int64 `[n, context_length]`.
        max_pixels: images with more are rejected from their header alone (Pillow itself refuses 179 million).
        source: the json key that `Row.source` is taken from.
        draft: let libjpeg scale large JPEGs down while decoding them, to no less than this many times the size that
            they are then resized to; None decodes them whole.
    """

    def __init__(
        self, spec: ImageSpec, tokenize: Tokenize, max_pixels: int, source: str = "url", *, draft: float | None = None
    ) -> None:
        self.spec = spec
        self.tokenize = tokenize
        self.max_pixels = max_pixels
        self.source = source
        self.draft = draft

    @classmethod
    def configured(cls, spec: ImageSpec, tokenize: Tokenize, data: DataConfig) -> Decoder:
        """The decoder that a config's `data` asks for."""
        return cls(spec, tokenize, data.max_pixels, data.source, draft=data.draft)

    def decode_shard(self, samples: Iterable[Sample], threads: int = 1) -> DecodedShard:
        """Decode samples with that many threads; a bounded number of encoded images is held at a time."""
        rows: list[Row] = []
        ok: list[int] = []
        captions: list[str] = []
        height, width = self.spec.size
        images = np.empty((0, 3, height, width), np.uint8)
        for row, pixels, caption in _ordered_map(self._decode, samples, threads):
            rows.append(row)
            if pixels is None:
                continue
            if len(ok) == len(images):
                # numpy reallocates in place where it can: a shard is never held twice.
                images.resize((max(64, len(images) * 3 // 2), *images.shape[1:]), refcheck=False)
            images[len(ok)] = pixels
            ok.append(len(rows) - 1)
            captions.append(caption[:MOST_LETTERS])
        images.resize((len(ok), *images.shape[1:]), refcheck=False)
        tokens = self.tokenize(captions) if captions else self.tokenize([""])[:0]
        ids = [uid_to_id(rows[place].uid) for place in ok]
        caption_ids = [rows[place].caption_id for place in ok]
        batch = PairBatch(
            torch.from_numpy(images),
            tokens.to(torch.int64),
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(caption_ids, dtype=torch.int64),
        )
        return DecodedShard(rows, batch, np.asarray(ok, np.int64))

    def _decode(self, sample: Sample) -> tuple[Row, _Pixels | None, str]:
        caption = sample.caption or ""
        row = Row(
            uid=sample.uid,
            key=sample.key,
            index=sample.index,
            status=sample.status,
            error=sample.error,
            width=0,
            height=0,
            caption_length=len(caption),
            source=_source(sample.meta, self.source),
            content="",
            caption_id=0 if sample.caption is None else caption_id(caption),
        )
        if sample.image is not None and sample.caption is not None:
            digest = hashlib.blake2b(sample.image, digest_size=16)
            digest.update(caption.encode())
            row.content = digest.hexdigest()
        if sample.status != Reason.OK or sample.image is None:
            return row, None, caption
        try:
            return row, self._pixels(sample.image, row), caption
        except _RejectedError as error:
            row.status, row.error = error.reason, str(error)
        except UnidentifiedImageError:
            row.status, row.error = Reason.CORRUPT_IMAGE, f"no image of the formats {', '.join(FORMATS)}"
        except Exception as error:  # decoders raise errors of many classes on broken data
            text = " ".join(_ADDRESS.sub("", str(error)).split())[:200] or type(error).__name__
            truncated = "truncated" in text.lower() or isinstance(error, EOFError)
            row.status, row.error = (Reason.TRUNCATED_IMAGE if truncated else Reason.CORRUPT_IMAGE), text
        row.status = str(row.status)
        return row, None, caption

    def _pixels(self, encoded: bytes, row: Row) -> _Pixels:
        """The transformed image, uint8 `[3, height, width]`; notes the original's size in `row`."""
        try:
            image: Image.Image = Image.open(BytesIO(encoded), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise _RejectedError(Reason.TOO_MANY_PIXELS, str(error)) from None
        with image:
            row.width, row.height = image.size
            if row.width * row.height > self.max_pixels:
                raise _RejectedError(Reason.TOO_MANY_PIXELS, f"{row.width} x {row.height}, at most {self.max_pixels}")
            size, box = _geometry(image.size, self.spec)
            if min(size) < 1:
                raise _RejectedError(Reason.ZERO_SIZE, f"{row.width} x {row.height} becomes {size[0]} x {size[1]}")
            if size[0] * size[1] > max(self.max_pixels, 4 * self.spec.size[0] * self.spec.size[1]):
                raise _RejectedError(
                    Reason.TOO_MANY_PIXELS, f"{size[0]} x {size[1]} after resizing, at most {self.max_pixels}"
                )
            # The part of the decoded image that is the whole picture: a size that is not divisible is rounded up.
            whole = None if self.draft is None else _scaled_down(image, size, self.draft)
            resized = image if image.size == size else image.resize(size, _RESAMPLING[self.spec.interpolation], whole)
            cropped = resized if box == (0, 0, *size) else resized.crop(box)
            return np.ascontiguousarray(np.asarray(cropped.convert("RGB")).transpose(2, 0, 1))


class _RejectedError(Exception):
    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(error)
        self.reason = reason


def _scaled_down(image: Image.Image, size: tuple[int, int], gap: float) -> tuple[float, float, float, float] | None:
    """Have a JPEG decoded smaller, for a resize to `size`; the box of the picture in it, None for other formats."""
    drafted = image.draft(None, (ceil(gap * size[0]), ceil(gap * size[1])))
    return None if drafted is None else drafted[1]


def uid_to_id(uid: str) -> int:
    """The signed 64-bit BLAKE2b of a uid: of all digits, as uids may be numbers that differ in the last ones alone."""
    return _digest(uid)


def caption_id(text: str) -> int:
    """The signed 64-bit BLAKE2b of a caption: equal for equal captions."""
    return _digest(text)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _geometry(image: tuple[int, int], spec: ImageSpec) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """To which (width, height) an image of that size is resized, and the box then cropped (outside it: padding).

    The roundings are torchvision's `Resize` and `CenterCrop` and open_clip's `ResizeKeepRatio` and `CenterCropOrPad`.
    """
    width, height = image
    target_height, target_width = spec.size
    if spec.resize_mode == "squash":
        return (target_width, target_height), (0, 0, target_width, target_height)
    if spec.resize_mode == "shortest" and target_height == target_width:
        longer = int(target_width * max(image) / min(image))
        size = (target_width, longer) if width <= height else (longer, target_width)
    else:
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if spec.resize_mode == "longest" else min(ratios)
        size = (round(width / ratio), round(height / ratio))
    left, top = _start(size[0], target_width), _start(size[1], target_height)
    return size, (left, top, left + target_width, top + target_height)


def _start(length: int, target: int) -> int:
    return -((target - length) // 2) if target > length else round((length - target) / 2.0)


def _source(meta: dict[str, Any] | None, key: str) -> str:
    value = (meta or {}).get(key)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return ""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    if "://" not in text:
        return text
    try:
        return urlsplit(text).hostname or ""
    except ValueError:
        return ""


def _ordered_map(function: Callable[[Sample], Any], samples: Iterable[Sample], threads: int) -> Iterator[Any]:
    """`map` with threads (Pillow releases the GIL), in order, a few samples per thread ahead, of large ones fewer."""
    if threads <= 1:
        yield from map(function, samples)
        return
    waiting: deque[tuple[Future[Any], int]] = deque()
    held = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for sample in samples:
            size = len(sample.image or b"") + len(sample.caption or "")
            waiting.append((pool.submit(function, sample), size))
            held += size
            while len(waiting) >= 8 * threads or (waiting and held > WAITING_BYTES):
                done, size = waiting.popleft()
                held -= size
                yield done.result()
        while waiting:
            yield waiting.popleft()[0].result()


# Our own limit is checked right after Pillow has read the header, and alpha is dropped as open_clip drops it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Palette images with Transparency", module="PIL")
