from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.inventory import inspect_shard
from pipeline.data.layout import Layout, find_layout
from pipeline.data.places import map_file
from pipeline.data.reader import read_shard
from pipeline.data.samples import samples_at
from pipeline.emit.members import locate_samples, read_keys, read_samples, sample_in
from pipeline.emit.tar import ChangedError, TarWriter, header, headers
from pipeline.errors import InputError
from tests.helpers import write_tar

PARTS = st.sampled_from(["a", "b", "ü", "x" * 60, "__meta__", "", "0"])
NAMES = st.builds("{}{}.{}".format, st.sampled_from(["", "d/", "d.e/", "n" * 90 + "/", "./"]), PARTS, st.sampled_from(
    ["jpg", "JPG", "txt", "json", "seg.png", ""]
))  # fmt: skip
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=700)), max_size=12)


def all_samples(url: str) -> list[Any]:
    count = sum(1 for _ in read_shard(url))
    return [
        (sample.index, sample.key, [(name, bytes(content)) for name, content in sample.members])
        for sample in read_samples(url, list(range(count)))
    ]


def samples_of(layout: Layout, content: bytes) -> list[tuple[str, list[tuple[str, bytes, bool]]]]:
    names = [bytes(row).rstrip(b"\0").decode() for row in layout.names]
    members = [
        (name, content[data : data + size], bool(json))
        for name, data, size, json in zip(names, layout.data, layout.sizes, layout.json, strict=True)
    ]
    return [
        (key.decode(), members[start:stop])
        for key, start, stop in zip(layout.keys, layout.first[:-1], layout.first[1:], strict=True)
    ]


@given(MEMBERS, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(deadline=None, max_examples=50)
def test_samples_are_the_readers_in_every_form_of_tar(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]], form: int
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1700000000.5 if form == tarfile.PAX_FORMAT else 0
            tar.addfile(info, io.BytesIO(content))
    (folder / "a.tar").write_bytes(buffer.getvalue())
    (folder / "a.tar.gz").write_bytes(gzip.compress(buffer.getvalue()))
    plain, packed = all_samples(str(folder / "a.tar")), all_samples(str(folder / "a.tar.gz"))
    assert plain == packed
    read = list(read_shard(str(folder / "a.tar")))
    assert [(index, key) for index, key, _ in plain] == [(sample.index, sample.key) for sample in read]
    for (_, _, contents), sample in zip(plain, read, strict=True):
        if sample.image is not None:
            assert {name.lower(): content for name, content in contents}[f".{sample.image_type}"] == sample.image
    layout = find_layout(buffer.getvalue())
    assert layout is None or samples_of(layout, buffer.getvalue()) == [
        (key, [(key + name, content, name.lower() == ".json") for name, content in contents])
        for _, key, contents in plain
    ]
    spans = locate_samples(str(folder / "a.tar"), [index for index, _, _ in plain])
    view = map_file(str(folder / "a.tar"))
    again = [sample_in(view[start:end], index) for index, (start, end) in enumerate(spans or [])]
    assert [(s.index, s.key, [(name, bytes(content)) for name, content in s.members]) for s in again] == plain


def test_a_shard_of_webdatasets_own_writer(tmp_path: Path) -> None:
    """Its fractional times put a pax header before each member."""
    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:03d}", "txt": f"caption {number}", "jpg": b"x" * number})
    content = Path(path).read_bytes()
    assert b"PaxHeader" in content
    layout = find_layout(content)
    assert layout is not None
    assert [key for key, _ in samples_of(layout, content)] == [f"{number:03d}" for number in range(5)]
    assert samples_of(layout.of(np.array([3, 1])), content) == [samples_of(layout, content)[n] for n in (3, 1)]
    assert [(key, dict(members)[".txt"]) for _, key, members in all_samples(path)] == [
        (f"{number:03d}", f"caption {number}".encode()) for number in range(5)
    ]


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar")
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("a.txt", tarfile.REGTYPE), ("b.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("c.txt"))
    assert [key for _, key, _ in all_samples(path)] == ["a", "c"]
    assert locate_samples(path, [0, 1]) is None


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_some_samples_of_a_tar_that_breaks_off(tmp_path: Path, suffix: str) -> None:
    path = Path(write_tar(tmp_path / f"a{suffix}", [(f"{number}.txt", bytes(600)) for number in range(9)]))
    assert [sample.index for sample in read_samples(str(path), [2, 3, 8])] == [2, 3, 8]
    if suffix == ".tar":
        path.write_bytes(path.read_bytes()[: 4 * 1536 + 700])
        assert [sample.index for sample in read_samples(str(path), [2, 3])] == [2, 3]
        with pytest.raises(InputError, match="sample number 4"):
            list(read_samples(str(path), [2, 4, 5]))
        with pytest.raises(InputError, match="sample number 4"):
            locate_samples(str(path), [2, 4])
    with pytest.raises(InputError, match="sample number 100"):
        list(read_samples(str(path), [100]))


@given(st.text("aü/.0", min_size=1, max_size=120), st.sampled_from([0, 1, 511, 8**11 - 1, 8**11, 2**40]))
@settings(deadline=None)
def test_headers_are_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def test_many_headers_are_as_one() -> None:
    members = [("a.txt", 0), ("b" * 99, 8**11 - 1), ("c.jpg", 51_234)]
    names = np.array([name.encode() for name, _ in members]).view(np.uint8).reshape(3, -1)
    made = headers(names, np.array([size for _, size in members]))
    assert [row.tobytes() for row in made] == [header(name, size) for name, size in members]


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700, 1536, 4000])
def test_a_layout_of_a_tar_that_breaks_off_has_whole_members_only(tmp_path: Path, cut: int) -> None:
    whole = Path(write_tar(tmp_path / "a.tar", [(f"{number}.txt", bytes(600)) for number in range(3)])).read_bytes()
    content = whole[: 3 * 1536 - cut]
    (tmp_path / "a.tar").write_bytes(content)
    layout = find_layout(content)
    keys = read_keys(str(tmp_path / "a.tar"))
    assert layout is None or [key for key, _ in samples_of(layout, content)] == keys


def test_a_written_tar_is_tarfiles_byte_for_byte(tmp_path: Path) -> None:
    contents = [bytes([number % 251]) * (number * 37 % 1500) for number in range(2000)]
    with open(tmp_path / "ours.tar", "wb") as handle:
        writer = TarWriter(handle)
        for number, content in enumerate(contents):
            writer.add(f"{number}.bin", memoryview(content))
        writer.close()
    assert writer.position == (tmp_path / "ours.tar").stat().st_size
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number, content in enumerate(contents):
            info = tarfile.TarInfo(f"{number}.bin")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_a_tar_is_copied_in_parts_with_other_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes and reads stop early, parts end within members, one member is larger than the buffer."""
    import os

    write, read = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:700]))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:300]], offset))
    monkeypatch.setattr("pipeline.emit.tar.BUFFER_BYTES", 2048)
    contents = [bytes([number]) * 1000 for number in range(7)] + [b"x" * 5000]
    with open(tmp_path / "a.tar", "wb") as handle:
        writer = TarWriter(handle)
        for number, content in enumerate(contents):
            writer.add(f"{number}.bin", content)
        writer.close()
    with open(tmp_path / "a.tar", "rb") as source, open(tmp_path / "b.tar", "wb") as handle:
        writer = TarWriter(handle)
        writer.copy(source.fileno(), 5 * 1536, 7 * 1536 + 512 + 5120, [(6 * 1536, b"6.bin", header("other.bin", 1000))])
        new = [(0, b"0.bin", header("n" * 90, 1000)), (1536, b"1.bin", header("last.bin", 1000))]
        writer.copy(source.fileno(), 0, 2 * 1536, new)
        writer.close()
    monkeypatch.undo()
    assert tar_members(tmp_path / "a.tar") == [(f"{number}.bin", content) for number, content in enumerate(contents)]
    assert tar_members(tmp_path / "b.tar") == [
        ("5.bin", contents[5]), ("other.bin", contents[6]), ("7.bin", contents[7]),
        ("n" * 90, contents[0]), ("last.bin", contents[1]),
    ]  # fmt: skip


def test_a_copy_of_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", bytes(9))])
    with open(path, "rb") as source, open(tmp_path / "b.tar", "wb") as handle:
        writer = TarWriter(handle)
        with pytest.raises(ChangedError):
            writer.copy(source.fileno(), 0, 1 << 20, [])
        with pytest.raises(ChangedError):
            writer.copy(source.fileno(), 0, 1024, [(0, b"b.txt", header("b.txt", 9))])


def tar_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def test_memory_is_that_of_the_samples_asked_for(tmp_path: Path) -> None:
    bomb = bytes(64 << 20)
    members = [("a.jpg", b"1"), ("a.txt", b"x"), ("b.bin", bomb), ("b.jpg", bomb), ("c.jpg", b"3"), ("c.bin", b"2")]
    path = str(tmp_path / "a.tar.gz")
    with gzip.open(path, "wb", 1) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    tracemalloc.start()
    found = [(sample.index, sample.key, sample.members) for sample in read_samples(path, [0, 2])]
    assert read_keys(path) == ["a", "b", "c"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(0, "a", [(".jpg", b"1"), (".txt", b"x")]), (2, "c", [(".jpg", b"3"), (".bin", b"2")])]
    assert peak < 8 << 20


def block(name: bytes, content: bytes, kind: bytes = b"0", size: bytes = b"", prefix: bytes = b"") -> bytes:
    """A member with any header, whose checksum is right, in GNU's form."""
    head = bytearray(tarfile.TarInfo("").tobuf(tarfile.GNU_FORMAT))
    for place, value in ((0, name), (124, size or b"%011o" % len(content)), (156, kind), (345, prefix)):
        head[place : place + len(value)] = value
    head[148:156] = b" " * 8
    head[148:154] = b"%06o" % sum(head)
    return bytes(head) + content + bytes(-len(content) % 512)


ODD = {
    "no-name": block(b"L", b"\0", b"L") + block(b"b.json", b"{}"),
    "no-path": block(b"x", b"8 path=\n", b"x") + block(b"b.json", b"{}"),
    "folder": block(b"x", b"16 path=b.json/\n", b"x") + block(b"c.json", b"{}"),
    "two-names": block(b"L", b"b.cls\0", b"L") + block(b"x", b"14 path=c.jpg\n", b"x") + block(b"d", b""),
    "no-number": block(b"x", b"10 size=x\n", b"x") + block(b"b.cls", b""),
    "below-zero": block(b"b.cls", b"", size=b"-0000002000"),
    "times": block(b"b.cls", b"", prefix=b"15000000000"),
    "for-all": block(b"g", b"29 size=99999999999999999999\n", b"g") + block(b"b.cls", b""),
    "sparse": block(b"g", b"21 GNU.sparse.size=7\n", b"g") + block(b"b.cls", b"0" * 9),
    "zero": block(b"x", b"16 path=b\0c.jpg\n", b"x") + block(b"d", b"1"),
    "unused": block(b"x", b"", b"x"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_odd_headers_mean_the_same_whoever_reads_them(tmp_path: Path, name: str) -> None:
    one, two, last = (block(key + b".jpg", b"1") + block(key + b".txt", b"x") for key in (b"a", b"b", b"z"))
    path = tmp_path / "a.tar"
    path.write_bytes(one + two + ODD[name] + (last if name != "unused" else b"") + bytes(1024))
    with read_shard(str(path)) as reader:
        samples = list(reader)
    assert not any("\0" in sample.key for sample in samples)
    places = str(tmp_path / "places.parquet")
    info = inspect_shard(0, str(path), places)
    assert (info.samples, info.end_error) == (len(samples), reader.end_error)
    assert list(samples_at(info, np.arange(len(samples)), "txt", lambda _: places)) == samples
    good = [sample for sample in samples if sample.status == "ok"]
    found = [
        (sample.index, sample.key, {ending: bytes(content) for ending, content in sample.members}[".jpg"])
        for sample in read_samples(str(path), [sample.index for sample in good])
    ]
    assert found == [(sample.index, sample.key, sample.image) for sample in good]
    assert read_keys(str(path))[: len(samples)] == [sample.key for sample in samples]
