"""Compressed shards: what gzip allows is read, and of a damaged file all that comes before the damage."""

from __future__ import annotations

import gzip
import random
import zlib
from pathlib import Path

import pytest

from pipeline.data.stream import ShardStream

RNG = random.Random(0)
CONTENT = b"".join(RNG.choice([b"caption" * 20, RNG.randbytes(300), bytes(1000)]) for _ in range(200))


def read(path: Path, content: bytes, size: int = 1 << 16) -> tuple[bytes, str]:
    """All bytes of a compressed file, read `size` at a time, and its error."""
    path.write_bytes(content)
    stream, parts = ShardStream(str(path)), []
    while part := stream.read(size):
        assert len(part) <= size
        parts.append(part)
    stream.close()
    return b"".join(parts), stream.error


def before_the_damage(content: bytes) -> bytes:
    """What zlib gives for one byte after the other until it complains."""
    inflate, out = zlib.decompressobj(31), bytearray()
    try:
        for place in range(len(content)):
            out += inflate.decompress(content[place : place + 1])
    except zlib.error:
        pass
    return bytes(out)


@pytest.mark.parametrize("size", [1, 512, 1 << 16])
def test_members_after_each_other_and_padding_are_read(tmp_path: Path, size: int) -> None:
    one, other = gzip.compress(CONTENT[:20_000]), gzip.compress(b"other")
    for content, expected in (
        (one, CONTENT[:20_000]),
        (one + other, CONTENT[:20_000] + b"other"),
        (one + bytes(512) + other + bytes(9000), CONTENT[:20_000] + b"other"),
        (gzip.compress(b""), b""),
        (b"", b""),
    ):
        assert read(tmp_path / "a.tar.gz", content, size) == (expected, "")


def test_every_byte_before_a_damage_is_given(tmp_path: Path) -> None:
    whole = gzip.compress(CONTENT)
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[RNG.randrange(20, len(whole) - 10)] ^= 0x55
        given, error = read(tmp_path / "a.tar.gz", bytes(damaged))
        assert error.startswith("broken compressed data: ")
        assert given == before_the_damage(bytes(damaged))


def test_a_file_that_ends_early_gives_what_it_has(tmp_path: Path) -> None:
    whole = gzip.compress(CONTENT)
    for end in (5, 300, len(whole) // 2, len(whole) - 4):
        given, error = read(tmp_path / "a.tgz", whole[:end])
        assert error == "broken compressed data: it ends in the middle"
        assert given == before_the_damage(whole[:end])
        assert CONTENT.startswith(given)


def test_what_is_no_gzip_says_so(tmp_path: Path) -> None:
    given, error = read(tmp_path / "a.tar.gz", b"plain bytes")
    assert (given, error[:24]) == (b"", "broken compressed data: ")
