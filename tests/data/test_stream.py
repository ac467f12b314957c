"""Remote storage that fails: a shard is read whole or an error is raised, never silently shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.data import stream
from pipeline.data.inventory import inspect_shard
from pipeline.data.reader import Sample, read_shard
from pipeline.errors import InputError
from tests.conftest import Bucket
from tests.helpers import FaultProxy, write_shards


@pytest.fixture
def shard(s3_bucket: Bucket, tmp_path: Path) -> str:
    (path,) = write_shards(tmp_path, shards=1, samples=24)
    return s3_bucket.put(path)[0]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 16 << 10)


@pytest.fixture
def through(
    s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[str, str, int], str]], FaultProxy]]:
    """Sends all further requests to S3 through a proxy with the given faults."""
    import s3fs

    started: list[FaultProxy] = []
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def start(fault: Callable[[str, str, int], str]) -> FaultProxy:
        proxy = FaultProxy(s3_bucket.endpoint, fault).__enter__()
        started.append(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        return proxy

    yield start
    for proxy in started:
        proxy.__exit__()
    s3fs.S3FileSystem.clear_instance_cache()


def count(url: str) -> int:
    with read_shard(url) as reader:
        samples = list(reader)
    assert reader.end_error == ""
    assert {sample.status for sample in samples} == {"ok"}
    return len(samples)


def test_s3_gives_what_the_local_file_gives(shard: str) -> None:
    assert count(shard) == 24
    info = inspect_shard(3, shard)
    assert (info.index, info.samples, info.name, len(info.etag)) == (3, 24, "00000.tar", 32)


@pytest.mark.parametrize("kind", ["503", "cut", "short", "slow"])
def test_passing_faults_are_overcome(
    shard: str, kind: str, through: Callable[[Callable[[str, str, int], str]], FaultProxy]
) -> None:
    proxy = through(lambda method, path, number: kind if method == "GET" and number % 3 == 1 else "ok")
    assert count(shard) == 24
    assert proxy.faults > 0


@pytest.mark.parametrize("kind", ["503", "cut", "short"])
def test_lasting_faults_raise_and_never_shorten_the_shard(
    shard: str,
    kind: str,
    through: Callable[[Callable[[str, str, int], str]], FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "ATTEMPTS", 2)
    proxy = through(lambda method, path, number: kind if number > 4 else "ok")
    seen: list[Sample] = []
    with read_shard(shard) as reader, pytest.raises(InputError, match=r"00000\.tar: cannot be read"):
        seen.extend(reader)
    assert 0 < len(seen) < 24
    assert proxy.faults > 0
    with pytest.raises(InputError, match=r"00000\.tar: cannot be read"):
        inspect_shard(0, shard)


def test_few_requests_are_made(
    shard: str, through: Callable[[Callable[[str, str, int], str]], FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1 << 20)
    proxy = through(lambda method, path, number: "ok")
    assert count(shard) == 24
    assert proxy.requests == 2


def test_missing_object_is_told_at_once(
    s3_bucket: Bucket, through: Callable[[Callable[[str, str, int], str]], FaultProxy]
) -> None:
    proxy = through(lambda method, path, number: "ok")
    with pytest.raises(InputError, match=r"absent\.tar: cannot be read"):
        read_shard(f"{s3_bucket.url}/absent.tar")
    assert proxy.requests <= 4
