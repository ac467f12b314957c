"""Decoded pixels against open_clip's own transform, and what becomes of images that cannot be used."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.models.compat  # noqa: F401  (before open_clip)
from pipeline.data import decode
from pipeline.data.decode import Decoder, ImageSpec, caption_id, uid_to_id
from pipeline.data.reader import Sample, read_shard
from tests.helpers import ByteTokenizer, image_bytes, uid_of

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
ByteSize = tuple[int, int]


def spec(size: ByteSize = (24, 24), **options: Any) -> ImageSpec:
    return ImageSpec(size, MEAN, STD, **options)


def sample(image: bytes | None, caption: str | None = "a dog", index: int = 0, **options: Any) -> Sample:
    values = {"meta": None, "status": "ok", "error": "", "uid": uid_of(index), **options}
    return Sample(index=index, key=f"{index:04d}", image=image, image_type="jpg", caption=caption, **values)


def decoder(image_spec: ImageSpec | None = None, max_pixels: int = 1_000_000) -> Decoder:
    return Decoder(image_spec or spec(), ByteTokenizer(), max_pixels)


def open_clip_pixels(encoded: bytes, image_spec: ImageSpec) -> torch.Tensor:
    """uint8 result of open_clip's evaluation transform, its normalisation undone (mean 0, deviation 1)."""
    import open_clip

    transform = open_clip.image_transform(
        image_spec.size,
        is_train=False,
        mean=MEAN,
        std=STD,
        resize_mode=image_spec.resize_mode,
        interpolation=image_spec.interpolation,
    )
    scaled = transform(Image.open(BytesIO(encoded))) * 255
    pixels = scaled.round()
    assert (pixels - scaled).abs().max() < 1e-3
    return pixels.to(torch.uint8)


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_bytes((40, 28), exif=exif)


def animated(file_format: str) -> bytes:
    frames = [Image.open(BytesIO(image_bytes((40, 30), seed=seed))) for seed in range(3)]
    buffer = BytesIO()
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


IMAGES = {
    "jpg": image_bytes((50, 37)),
    "jpg-large": image_bytes((400, 301), quality=90),
    "jpg-progressive": image_bytes((64, 48), progressive=True),
    "jpg-grey": image_bytes((31, 57), "L"),
    "jpg-cmyk": image_bytes((41, 57), "CMYK"),
    "jpg-exif": rotated_by_exif(),
    "png": image_bytes((24, 24), file_format="PNG"),
    "png-small": image_bytes((9, 13), file_format="PNG"),
    "png-alpha": image_bytes((50, 60), "RGBA", "PNG"),
    "png-grey-alpha": image_bytes((50, 60), "LA", "PNG"),
    "png-palette": image_bytes((50, 60), "P", "PNG"),
    "png-palette-transparent": image_bytes((50, 60), "P", "PNG", transparency=b"\x00\x80\xff"),
    "png-bilevel": image_bytes((50, 60), "1", "PNG"),
    "png-16-bit": image_bytes((50, 60), "I;16", "PNG"),
    "webp": image_bytes((50, 37), file_format="WEBP"),
    "webp-alpha": image_bytes((50, 37), "RGBA", "WEBP", lossless=True),
    "webp-animated": animated("WEBP"),
    "png-animated": animated("PNG"),
    "gif-named-jpg": animated("GIF"),
    "one-pixel": image_bytes((1, 1), file_format="PNG"),
    "thin": image_bytes((3, 97), file_format="PNG"),
}
SPECS = {
    "shortest": spec(),
    "shortest-odd": spec((27, 27)),
    "bilinear": spec(interpolation="bilinear"),
    "not-square": spec((20, 32)),
    "longest": spec((25, 25), resize_mode="longest"),
    "longest-not-square": spec((32, 20), resize_mode="longest", interpolation="bilinear"),
    "squash": spec((22, 30), resize_mode="squash"),
}


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("image_name", IMAGES)
def test_pixels_are_those_of_open_clip(image_name: str, spec_name: str) -> None:
    encoded, image_spec = IMAGES[image_name], SPECS[spec_name]
    decoded = decoder(image_spec).decode_shard([sample(encoded)])
    assert decoded.rows[0].status == "ok", decoded.rows[0].error
    assert decoded.batch.images.dtype == torch.uint8
    assert torch.equal(decoded.batch.images[0], open_clip_pixels(encoded, image_spec))
    with Image.open(BytesIO(encoded)) as image:
        assert (decoded.rows[0].width, decoded.rows[0].height) == image.size


def waves(size: ByteSize) -> Image.Image:
    """A smooth picture, the same whatever its size."""
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    channels = [np.sin(2 * np.pi * (count * x + y)) for count in (1, 2, 3)]
    return Image.fromarray(np.uint8(127.5 + 120 * np.stack(channels, 2)))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(401, 301), (303, 405), (96, 97), (1601, 801)])
@pytest.mark.parametrize("spec_name", SPECS)
def test_drafted_pixels_are_near_the_exact_ones(size: ByteSize, spec_name: str) -> None:
    """Sizes that are not divisible do not shift the picture."""
    drafting = Decoder(SPECS[spec_name], ByteTokenizer(), 10_000_000, draft=2)
    for encoded in (jpeg(waves(size)), jpeg(waves(size).convert("L")), jpeg(waves(size), progressive=True)):
        drafted = drafting.decode_shard([sample(encoded)])
        assert (drafted.rows[0].width, drafted.rows[0].height) == size
        exact = open_clip_pixels(encoded, SPECS[spec_name])
        differ = (drafted.batch.images[0].int() - exact.int()).abs()
        assert differ.float().mean() < 1
        assert differ.max() <= 16


def test_drafts_are_of_large_jpegs_alone() -> None:
    drafting = Decoder(spec(), ByteTokenizer(), 10_000_000, draft=2)
    small, large = jpeg(waves((95, 120))), jpeg(waves((96, 120)))
    buffer = BytesIO()
    waves((400, 400)).save(buffer, "PNG")
    for encoded, equal in [(small, True), (buffer.getvalue(), True), (large, False)]:
        drafted = drafting.decode_shard([sample(encoded)]).batch.images[0]
        assert torch.equal(drafted, open_clip_pixels(encoded, spec())) == equal


def test_a_draft_of_a_truncated_jpeg_is_rejected_as_such() -> None:
    encoded = jpeg(waves((400, 301)))
    drafting = Decoder(spec(), ByteTokenizer(), 10_000_000, draft=2)
    row = drafting.decode_shard([sample(encoded[: len(encoded) // 2])]).rows[0]
    assert row.status == "truncated-image"
    assert (row.width, row.height) == (400, 301)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = image_bytes((200, 150), quality=95)
PNG = image_bytes((200, 150), file_format="PNG")
WEBP = image_bytes((200, 150), file_format="WEBP", lossless=True)


@pytest.mark.parametrize(
    ("encoded", "status", "error"),
    [
        (JPEG[: len(JPEG) // 2], "truncated-image", "truncated"),
        (PNG[: len(PNG) // 2], "truncated-image", ""),
        (WEBP[: len(WEBP) // 2], "corrupt-image", ""),
        (b"not an image", "corrupt-image", "no image of the formats JPEG"),
        (JPEG[:20], "corrupt-image", ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "corrupt-image", "no image of the formats"),
        (png_header(50_000, 50_000), "too-many-pixels", "50000 x 50000|decompression bomb"),
        (png_header(1001, 1000), "too-many-pixels", "1001 x 1000, at most 1000000"),
        (png_header(1, 900_000), "too-many-pixels", "24 x 21600000 after resizing"),
    ],
)
def test_images_that_cannot_be_used(encoded: bytes, status: str, error: str) -> None:
    good = sample(JPEG, index=1)
    decoded = decoder().decode_shard([sample(encoded), good])
    assert [row.status for row in decoded.rows] == [status, "ok"]
    row = decoded.rows[0]
    assert any(part in row.error for part in error.split("|"))
    assert type(row.status) is str
    assert "0x" not in row.error
    assert decoded.ok.tolist() == [1]
    assert len(decoded.batch) == 1


def test_nothing_is_left_of_a_thin_image_padded_to_its_longest_side() -> None:
    longest = spec((16, 16), resize_mode="longest")
    (row,) = decoder(longest).decode_shard([sample(image_bytes((2, 200), file_format="PNG"))]).rows
    assert (row.status, row.width, row.height) == ("zero-size", 2, 200)


def test_rows_of_bad_samples_keep_their_reason() -> None:
    samples = [sample(None, status="no-image", error="why"), sample(JPEG, None, status="no-caption", error="?")]
    decoded = decoder().decode_shard(samples)
    assert [(row.status, row.error, row.content) for row in decoded.rows] == [
        ("no-image", "why", ""),
        ("no-caption", "?", ""),
    ]
    assert decoded.batch.images.shape == (0, 3, 24, 24)
    assert decoded.batch.tokens.shape == (0, 16)


def test_batch_matches_rows_whatever_the_threads(tiny_shards: list[str]) -> None:
    def decode(threads: int) -> Any:
        samples = [broken if broken.index != 3 else sample(b"bad", index=3) for broken in read_shard(tiny_shards[0])]
        return decoder().decode_shard(samples * 20, threads)

    one, several = decode(1), decode(4)
    assert one.rows == several.rows
    for name in one.batch.__slots__:
        assert torch.equal(getattr(one.batch, name), getattr(several.batch, name))
    assert one.ok.tolist() == [place for place in range(160) if place % 8 != 3]
    assert one.ok.dtype == np.int64
    assert one.batch.ids.tolist() == [uid_to_id(one.rows[place].uid) for place in one.ok]
    assert torch.equal(one.batch.tokens[0], ByteTokenizer()(["a red boat"])[0])


def test_a_long_caption_is_tokenized_as_far_as_a_model_may_see_it() -> None:
    seen: list[str] = []

    def tokenize(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.zeros(len(texts), 1, dtype=torch.int64)

    caption = "word " * 100_000
    (row,) = Decoder(spec(), tokenize, 10_000).decode_shard([sample(image_bytes(), caption)]).rows
    assert (row.status, row.caption_length, row.caption_id) == ("ok", len(caption), caption_id(caption))
    assert [len(text) for text in seen] == [decode.MOST_LETTERS]


def test_few_large_samples_wait_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    done, ahead = 0, []

    def samples() -> Iterator[Sample]:
        for index in range(40):
            ahead.append(index - done)
            yield sample(b"0" * 100, "", index)

    for limit, most in ((decode.WAITING_BYTES, 15), (450, 4)):
        monkeypatch.setattr(decode, "WAITING_BYTES", limit)
        done, ahead = 0, []
        for index in decode._ordered_map(lambda each: each.index, samples(), threads=2):
            assert index == done
            done += 1
        assert (done, max(ahead)) == (40, most)


def test_row_of_a_good_sample() -> None:
    meta = {"url": "https://user@images.example:8080/a/b.jpg?x=1"}
    first, second, third = (
        decoder().decode_shard([each]).rows[0]
        for each in (sample(JPEG, "a dog", meta=meta), sample(JPEG, "a cat"), sample(JPEG, "a dog", index=5))
    )
    assert (first.source, second.source) == ("images.example", "")
    assert first.caption_length == 5
    assert first.caption_id == caption_id("a dog") == third.caption_id != second.caption_id
    assert first.content == third.content != second.content
    assert len(first.content) == 32


@pytest.mark.parametrize(
    ("meta", "source"),
    [
        ({"url": "site"}, "site"),
        ({"url": 7}, "7"),
        ({"url": None}, ""),
        ({"url": ["a"]}, ""),
        ({"url": "http://[bad"}, ""),
        ({"url": "half \ud83d pair"}, "half \\ud83d pair"),
        ({}, ""),
    ],
)
def test_source(meta: dict[str, Any], source: str) -> None:
    assert decoder().decode_shard([sample(JPEG, meta=meta)]).rows[0].source == source


def test_ids() -> None:
    numbered = [f"{number:032x}" for number in range(1000)]
    numbered += [f"{number:03x}".ljust(32, "0") for number in range(1, 1000)]
    ids = [uid_to_id(uid) for uid in numbered]
    assert len(set(ids)) == len(ids)
    assert all(-(1 << 63) <= number < 1 << 63 for number in ids)
    assert uid_to_id("f" * 32) == int.from_bytes(hashlib.blake2b(b"f" * 32, digest_size=8).digest(), "big", signed=True)
    assert caption_id("a") != caption_id("b")
