from __future__ import annotations

import os
import tarfile
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


def test_places_are_kept_on_an_object_store_and_of_remote_shards_there_are_none(
    tmp_path: Path, s3_bucket: Bucket
) -> None:
    (local,) = write_shards(tmp_path, shards=1, samples=4)
    (remote,) = s3_bucket.put(local)
    places = f"{s3_bucket.url}/places/00000.parquet"
    inspect_shard(0, local, places)
    assert as_lists(read_places(places, local, [2, 3])) == as_lists(locate_members(local).of(np.array([2, 3])))  # type: ignore[union-attr]
    assert inspect_shard(1, remote, f"{s3_bucket.url}/places/00001.parquet").samples == 4
    assert read_places(f"{s3_bucket.url}/places/00001.parquet", remote, [0]) is None
