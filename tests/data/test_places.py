from __future__ import annotations

import os
import tarfile
from io import BytesIO
from pathlib import Path

import duckdb
import numpy as np
import pytest

from pipeline.data.inventory import inspect_shard
from pipeline.data.layout import Layout
from pipeline.data.places import locate_members, read_places
from pipeline.data.reader import read_shard
from tests.conftest import Bucket
from tests.helpers import write_shards, write_tar


def as_lists(layout: Layout | None) -> list[list[object]]:
    assert layout is not None
    names = [bytes(name).rstrip(b"\0") for name in layout.names]
    columns = (layout.keys, layout.data, layout.sizes, layout.json, layout.first)
    return [names, *(column.tolist() for column in columns)]


def test_what_is_kept_is_what_is_found(tmp_path: Path) -> None:
    (url,) = write_shards(tmp_path, shards=1, samples=9)
    places = str(tmp_path / "places" / "00000.parquet")
    assert inspect_shard(0, url, places) == inspect_shard(0, url)
    layout = locate_members(url)
    assert layout is not None
    for samples in (list(range(9)), [4, 1, 7], []):
        found = read_places(places, url, samples)
        if samples:
            assert as_lists(found) == as_lists(layout.of(np.array(samples)))
        else:
            assert found is not None
            assert len(found) == 0
    content = Path(url).read_bytes()
    ((key, names, data, sizes),) = duckdb.sql(f"select key, names, data, sizes from '{places}' limit 1").fetchall()
    assert [name.decode() for name in names] == [f"{key}.jpg", f"{key}.txt", f"{key}.json"]
    assert content[data[1] : data[1] + sizes[1]].startswith(b"a ")


def test_nothing_is_believed_of_another_version_shard_or_sample(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, shards=2, samples=4)
    places = str(tmp_path / "places.parquet")
    inspect_shard(0, first, places)
    assert read_places(places, first, [3]) is not None
    assert read_places(places, first, [4]) is None
    assert read_places(places, second, [3]) is None
    assert read_places(str(tmp_path / "absent.parquet"), first, [3]) is None
    os.utime(first, (1, 1))
    assert read_places(places, first, [3]) is None
    os.unlink(first)
    assert read_places(places, first, [3]) is None


@pytest.mark.parametrize("kind", ["compressed", "no marker", "cut", "checksum", "link", "empty"])
def test_other_shards_are_read_through(tmp_path: Path, kind: str) -> None:
    url = write_tar(tmp_path / f"a.tar{'.gz' if kind == 'compressed' else ''}", [(f"{n}.txt", b"x") for n in range(5)])
    content = bytearray(Path(url).read_bytes())
    if kind == "no marker":
        content = content[: 5 * 1024]
    elif kind == "cut":
        content = content[: 4 * 1024 + 600]
    elif kind == "checksum":
        content[2 * 1024 + 150] ^= 1
    elif kind == "empty":
        content = content[5 * 1024 :]
    if kind == "link":
        with tarfile.open(url, "a") as tar:
            link = tarfile.TarInfo("b.txt")
            link.type = tarfile.SYMTYPE
            tar.addfile(link)
    else:
        Path(url).write_bytes(content)
    places = tmp_path / "places.parquet"
    info = inspect_shard(0, url, str(places))
    with read_shard(url) as reader:
        assert info.samples == sum(1 for _ in reader)
    assert info.end_error == reader.end_error
    assert not places.exists()


def test_places_are_kept_on_an_object_store_and_of_shards_on_it(tmp_path: Path, s3_bucket: Bucket) -> None:
    (local,) = write_shards(tmp_path, shards=1, samples=4)
    (remote,) = s3_bucket.put(local)
    for number, url in enumerate((local, remote)):
        places = f"{s3_bucket.url}/places/{number:05d}.parquet"
        assert inspect_shard(number, url, places).samples == 4
        for samples in ([2, 3], None):
            layout = locate_members(local)
            assert layout is not None
            expected = layout.of(np.array(samples)) if samples else layout
            assert as_lists(read_places(places, url, samples)) == as_lists(expected)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("odd", ["", "folder", "long", "time", "letters", "hidden", "repeated", "many"])
def test_headers_read_one_by_one_say_what_the_whole_tar_does(tmp_path: Path, form: int, odd: str) -> None:
    path = tmp_path / "a.tar"
    names = [f"set/{number}.{ending}" for number in range(3) for ending in ("jpg", "txt", "seg.png")]
    names += {
        "long": ["x" * 60 + "/" + "y" * 60 + ".txt"],
        "letters": ["ä.txt"],
        "hidden": ["__meta__.txt"],
        "repeated": ["set/0.jpg", "set/0.txt"],
        "many": [f"set/9.{number}" for number in range(20)],
    }.get(odd, [])
    with tarfile.open(path, "w", format=form) as tar:
        if odd == "folder":
            folder = tarfile.TarInfo("set")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            info.mtime = 0.5 if odd == "time" and form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, BytesIO(bytes(info.size)))
    with read_shard(str(path)) as reader:
        samples, found = reader.locate()
    whole = locate_members(str(path), whole=True)
    assert (found is None) == (whole is None) == (odd in ("long", "letters", "hidden", "many"))
    if whole is not None:
        assert as_lists(found) == as_lists(whole)
        assert samples == len(whole)
        assert whole.repeats().tolist() == [False] * 3 + [True] * (odd == "repeated")
