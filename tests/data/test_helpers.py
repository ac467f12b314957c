"""The shared fixtures do what other tests rely on."""

from __future__ import annotations

import tarfile
from pathlib import Path

import fsspec
import pytest

from tests.conftest import Bucket
from tests.helpers import FaultProxy, write_shards


def test_shards_have_the_same_bytes_each_time(tmp_path: Path, tiny_shards: list[str]) -> None:
    again = write_shards(tmp_path)
    assert [Path(path).read_bytes() for path in again] == [Path(path).read_bytes() for path in tiny_shards]
    with tarfile.open(again[1]) as tar:
        assert tar.getnames()[:3] == ["00000008.jpg", "00000008.txt", "00000008.json"]


def test_bucket_gives_back_what_was_put(s3_bucket: Bucket, tiny_shards: list[str]) -> None:
    (url,) = s3_bucket.put(tiny_shards[0])
    with fsspec.open(url, "rb") as handle:
        assert handle.read() == Path(tiny_shards[0]).read_bytes()


def test_fault_proxy_passes_on_and_counts(s3_bucket: Bucket, tiny_shards: list[str]) -> None:
    (url,) = s3_bucket.put(tiny_shards[0])
    with FaultProxy(s3_bucket.endpoint) as proxy:
        options = {"client_kwargs": {"endpoint_url": proxy.url}, "skip_instance_cache": True}
        with fsspec.open(url, "rb", **options) as handle:
            assert handle.read() == Path(tiny_shards[0]).read_bytes()
    assert proxy.requests > 0
    assert proxy.faults == 0


@pytest.mark.ray
def test_local_ray_runs_a_task(ray_local: None) -> None:
    import ray

    assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
