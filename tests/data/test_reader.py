"""Samples of good and bad shards: one row each, in order, with the reason, and where a broken tar ended."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pipeline.data import reader as reader_module
from pipeline.data.inventory import inspect_shard, read_inventory, write_inventory
from pipeline.data.reader import Sample, read_shard
from pipeline.errors import InputError
from tests.helpers import Member, image_bytes, sample_members, tar_bytes, uid_of, write_shards, write_tar

IMAGE = image_bytes()


def read(path: str, caption: str = "txt") -> tuple[list[Sample], str]:
    with read_shard(path, caption=caption) as reader:
        samples = list(reader)
    return samples, reader.end_error


def read_members(tmp_path: Path, members: list[Member], caption: str = "txt") -> list[Sample]:
    samples, end_error = read(write_tar(tmp_path / "shard.tar", members), caption)
    assert end_error == ""
    return samples


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_every_compression_gives_the_same_samples(tmp_path: Path, suffix: str) -> None:
    (path,) = write_shards(tmp_path, shards=1, samples=5, suffix=suffix)
    samples, end_error = read(path)
    assert end_error == ""
    assert [sample.index for sample in samples] == list(range(5))
    assert [sample.key for sample in samples] == [f"{number:08d}" for number in range(5)]
    assert {sample.status for sample in samples} == {"ok"}
    assert samples[3].image == image_bytes((35, 32), seed=3)
    assert samples[3].caption == "a old boat"
    assert samples[3].image_type == "jpg"
    assert samples[3].meta == {"uid": uid_of(3, "0"), "url": "https://site0.example/3.jpg"}
    info = inspect_shard(0, path)
    assert (info.samples, info.bytes, info.name, info.end_error) == (5, os.path.getsize(path), "00000" + suffix, "")


def test_uid_is_that_of_the_json_or_made_of_shard_name_and_key(tmp_path: Path) -> None:
    uid = uid_of(1)
    metas: list[Any] = [{"uid": uid}, {"uid": uid.upper()}, {"uid": uid[:-1]}, {"uid": uid + "0"}, {"uid": 7}, None]
    members = [member for i, meta in enumerate(metas) for member in sample_members(f"a/{i}", IMAGE, "x", meta)]
    uids = [sample.uid for sample in read_members(tmp_path, members)]
    made = [hashlib.blake2b(f"shard.tar/a/{i}".encode(), digest_size=16).hexdigest() for i in range(len(metas))]
    assert uids == [uid, uid, *made[2:]]
    elsewhere = write_tar(tmp_path / "elsewhere" / "shard.tar", members)
    assert [sample.uid for sample in read(elsewhere)[0]] == uids


def test_key_ends_at_the_first_dot_after_the_folder(tmp_path: Path) -> None:
    members = [("v1.2/a.b.jpg", IMAGE), ("v1.2/a.jpg", IMAGE), ("v1.2/a.txt", b"x"), ("b/a.txt", b"y"), ("no-dot", b"")]
    samples = read_members(tmp_path, members)
    assert [(sample.key, sample.status) for sample in samples] == [("v1.2/a", "ok"), ("b/a", "no-image")]


def test_image_types_are_taken_in_the_order_of_open_clip(tmp_path: Path) -> None:
    png = image_bytes(file_format="PNG")
    samples = read_members(tmp_path, [("a.webp", b"w"), ("a.PNG", png), ("a.txt", b"x")])
    assert (samples[0].image, samples[0].image_type) == (png, "png")


@pytest.mark.parametrize(
    ("members", "status", "error"),
    [
        (sample_members("a", None, "x"), "no-image", "no member ends in jpg"),
        (sample_members("a", IMAGE, "x", extension="gif"), "no-image", "no member ends in jpg"),
        (sample_members("a", b"", "x"), "zero-size", "the jpg member is empty"),
        (sample_members("a", IMAGE, None), "no-caption", "no member ends in txt"),
        (sample_members("a", IMAGE, b"caf\xe9"), "bad-utf8", "byte 3"),
        (sample_members("a", IMAGE, " \n\t"), "empty-caption", "white space"),
        (sample_members("a", IMAGE, ""), "empty-caption", "white space"),
        (sample_members("a", IMAGE, "x", b"{"), "bad-json", ""),
        (sample_members("a", IMAGE, "x", b"\xff\xfe\xfd"), "bad-json", ""),
        (sample_members("a", IMAGE, "x", [1]), "bad-json", "found list"),
        (sample_members("a", IMAGE, "x", b"[" * 100_000), "bad-json", ""),
        (sample_members("a", IMAGE, "x", b"1" * 5000), "bad-json", ""),
        (sample_members("a", None, None, {}), "no-image", ""),
    ],
)
def test_each_reason(tmp_path: Path, members: list[Member], status: str, error: str) -> None:
    good = sample_members("b", IMAGE, "good")
    samples = read_members(tmp_path, members + good)
    assert [sample.status for sample in samples] == [status, "ok"]
    assert error in samples[0].error
    assert "\n" not in samples[0].error


@pytest.mark.parametrize(
    ("meta", "status", "caption"),
    [
        ({"text": "from json"}, "ok", "from json"),
        ({}, "no-caption", None),
        ({"text": ["a", "b"]}, "no-caption", None),
        ({"text": " "}, "empty-caption", " "),
        (b'{"text": "half \\ud83d pair"}', "bad-utf8", None),
        (b'{"text": "\\ud83d\\ude00"}', "ok", "\U0001f600"),
        (b"{", "bad-json", None),
        (None, "no-caption", None),
    ],
)
def test_caption_from_a_json_key(tmp_path: Path, meta: Any, status: str, caption: str | None) -> None:
    (sample,) = read_members(tmp_path, sample_members("a", IMAGE, None, meta), "json:text")
    assert (sample.status, sample.caption) == (status, caption)


def test_duplicate_keys_have_rows_of_their_own(tmp_path: Path) -> None:
    one, other = sample_members("a", IMAGE, "x"), sample_members("b", IMAGE, "y")
    samples = read_members(tmp_path, one + one + other + one)
    assert [(s.key, s.status) for s in samples] == [
        ("a", "ok"),
        ("a", "duplicate-key"),
        ("b", "ok"),
        ("a", "duplicate-key"),
    ]


def test_large_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_MEMBER_BYTES", 2000)
    samples = read_members(tmp_path, sample_members("a", b"0" * 2001, "x") + sample_members("b", b"0" * 2000, "x"))
    assert [sample.status for sample in samples] == ["too-large", "ok"]
    assert samples[0].image is None
    monkeypatch.setattr(reader_module, "MAX_TEXT_BYTES", 20)
    long = [sample_members("a", b"0", "x" * 21), sample_members("b", b"0", "x", {"uid": "0" * 32})]
    samples = read_members(tmp_path, [*long[0], *long[1], *sample_members("c", b"0", "x" * 20)])
    assert [sample.status for sample in samples] == ["too-large", "too-large", "ok"]
    assert [sample.error for sample in samples[:2]] == [
        f"the {ending} member is over 20 bytes or sparse" for ending in ("txt", "json")
    ]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_breaks_off_where_headers_would_fill_the_memory(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("bomb")
    header.type, header.size = kind, 64 << 20
    one, other = (tar_bytes(sample_members(key, IMAGE, "x")) for key in ("a", "b"))
    head = one.rstrip(b"\0")
    head += bytes(-len(head) % 512)
    content = head + header.tobuf() + bytes(header.size) + other
    path = tmp_path / "shard.tar.gz"
    path.write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    samples, end_error = read(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(sample.key, sample.status) for sample in samples] == [("a", "truncated-sample")]
    assert end_error == f"the tar breaks off at byte {len(head)}: {header.size} bytes of headers before a member"
    assert peak < 8 << 20


def test_harmful_names_and_odd_members_go_nowhere(tmp_path: Path) -> None:
    shard = tmp_path / "in" / "odd.tar"
    shard.parent.mkdir()
    outside = tmp_path / "outside"
    with tarfile.open(shard, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
            header = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            header.type, header.linkname = kind, str(outside)
            tar.addfile(header)
        for name in ("../outside/a.jpg", "../outside/a.txt", f"{outside}/b.jpg", f"{outside}/b.txt", "__meta__/c.txt"):
            header = tarfile.TarInfo(name)
            content = IMAGE if name.endswith("jpg") else b"x"
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    samples, end_error = read(str(shard))
    assert [(sample.key, sample.status) for sample in samples] == [("../outside/a", "ok"), (f"{outside}/b", "ok")]
    assert end_error == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_not_utf8_become_printable_keys(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in sample_members(name, IMAGE, "x"):
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    ((sample,), _) = read(str(tmp_path / "odd.tar"))
    assert sample.key == "caf\\xe9"
    assert sample.uid == hashlib.blake2b(b"odd.tar/caf\xe9", digest_size=16).hexdigest()


def test_tar_cut_within_a_sample_keeps_those_before(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, shards=1, samples=4)
    content = Path(path).read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmember("00000002.jpg").offset_data
    Path(path).write_bytes(content[: third + 100])
    samples, end_error = read(path)
    assert [sample.status for sample in samples] == ["ok", "ok", "truncated-sample"]
    assert end_error == f"the tar breaks off at byte {third + 100}: unexpected end of data"
    assert samples[2].error == end_error
    assert inspect_shard(0, path).samples == 3
    assert inspect_shard(0, path).end_error == end_error


def test_damaged_header_ends_the_tar_and_says_where(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, shards=1, samples=4)
    content = bytearray(Path(path).read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmember("00000002.jpg").offset
    content[offset + 10] ^= 0xFF
    Path(path).write_bytes(content)
    samples, end_error = read(path)
    assert [sample.status for sample in samples] == ["ok", "truncated-sample"]
    assert end_error == f"the tar breaks off at byte {offset}: bad checksum"


def test_missing_end_marker_is_told_but_loses_nothing(tmp_path: Path) -> None:
    content = tar_bytes(sample_members("a", IMAGE, "x")).rstrip(b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(content + b"\0" * (-len(content) % 512))
    samples, end_error = read(str(path))
    assert [sample.status for sample in samples] == ["ok"]
    assert end_error.startswith("no end-of-archive marker at byte")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_cut_compressed_stream_keeps_what_came_before(tmp_path: Path, suffix: str) -> None:
    # Random images barely compress, so that half of the bytes hold about half of the samples.
    (path,) = write_shards(tmp_path, shards=1, samples=40, size=64, suffix=suffix)
    content = Path(path).read_bytes()
    if suffix == ".tar.zst":
        raw = zstandard.ZstdDecompressor().decompress(content)
        compressor = zstandard.ZstdCompressor().compressobj()
        blocks = [raw[i : i + 8192] for i in range(0, len(raw), 8192)]
        content = b"".join(
            compressor.compress(block) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for block in blocks
        )
    Path(path).write_bytes(content[: len(content) // 2])
    samples, end_error = read(path)
    assert 10 < len(samples) < 35
    assert [sample.status for sample in samples[:-1]] == ["ok"] * (len(samples) - 1)
    assert "breaks off" in end_error
    assert inspect_shard(0, path).samples == len(samples)


def test_damaged_gzip_says_so(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, shards=1, samples=4, suffix=".tar.gz")
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    Path(path).write_bytes(content)
    samples, end_error = read(path)
    assert "broken compressed data" in end_error
    assert samples[-1].status == "truncated-sample"


def test_gzip_of_several_parts_is_read_to_the_end(tmp_path: Path) -> None:
    content = tar_bytes(sample_members("a", IMAGE, "x") + sample_members("b", IMAGE, "y"))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]))
    samples, end_error = read(str(path))
    assert ([sample.status for sample in samples], end_error) == (["ok", "ok"], "")


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\xff" * 5000])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_what_is_no_tar_has_no_samples_and_says_why(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    samples, end_error = read(str(path))
    assert samples == []
    assert "byte 0" in end_error


def test_empty_tar_is_complete(tmp_path: Path) -> None:
    assert read_members(tmp_path, []) == []


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_memory_is_that_of_a_few_samples(tmp_path: Path, suffix: str) -> None:
    noise = os.urandom(1 << 20)
    path = write_tar(tmp_path / f"a{suffix}", [m for i in range(40) for m in sample_members(str(i), noise, "x")])
    tracemalloc.start()
    with read_shard(path) as reader:
        assert sum(1 for _ in reader) == 40
    with read_shard(path) as reader:
        assert reader.locate()[0] == 40
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_missing_shard_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.tar"):
        read_shard(str(tmp_path / "absent.tar"))
    with pytest.raises(InputError, match=r"absent\.tar"):
        inspect_shard(0, str(tmp_path / "absent.tar"))


def test_inventory_is_read_back_as_written(tmp_path: Path, tiny_shards: list[str]) -> None:
    infos = [inspect_shard(index, url) for index, url in enumerate(tiny_shards)]
    assert [info.samples for info in infos] == [8, 8]
    assert all(info.etag for info in infos)
    url = str(tmp_path / "inventory.parquet")
    write_inventory(url, infos)
    assert read_inventory(url) == infos


def test_etag_changes_with_the_file(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, shards=1, samples=1)
    before = inspect_shard(0, path).etag
    assert inspect_shard(0, path).etag == before
    os.utime(path, (1, 1))
    assert inspect_shard(0, path).etag != before
