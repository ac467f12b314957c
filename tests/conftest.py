"""Fixtures shared by all tests: tiny shards, an S3 endpoint on loopback, a local Ray, the folder of real data."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, which reads it once:
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.helpers import write_shards


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that start Ray first: they take longest, and the short ones even out the end."""
    long = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[str]]:
    """`write_shards` into a new folder below `tmp_path` (takes its keyword arguments)."""

    def make(**options: Any) -> list[str]:
        return write_shards(tmp_path / f"shards-{uuid.uuid4().hex[:6]}", **options)

    return make


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two good shards of eight 32-pixel pairs each; made once, so leave them as they are."""
    return write_shards(tmp_path_factory.mktemp("tiny-shards"))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 endpoint on loopback; the environment of this process and its children points to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield settings["AWS_ENDPOINT_URL"]
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    server.stop()


@dataclass
class Bucket:
    """An empty bucket on the loopback endpoint: `s3://NAME`."""

    url: str
    endpoint: str

    def put(self, *paths: str | Path) -> list[str]:
        """Upload local files to the root of the bucket; their URLs."""
        import s3fs

        filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
        urls = [f"{self.url}/{Path(path).name}" for path in paths]
        for path, url in zip(paths, urls, strict=True):
            filesystem.put_file(str(path), url)
        return urls


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> Iterator[Bucket]:
    """A new bucket; fsspec's instances are forgotten before and after, so that listings are never stale."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    yield Bucket(f"s3://{name}", s3_endpoint)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def ray_local(s3_endpoint: str) -> Iterator[None]:
    """One local Ray with two CPUs for the whole session; its workers see the loopback S3 endpoint and `tests`."""
    import ray

    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",  # never another Ray that happens to run on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pairs named by $DIFFPRUNE_TEST_DATA; skips without it (mark such tests `realdata`)."""
    folder = os.environ.get("DIFFPRUNE_TEST_DATA")
    if not folder:
        pytest.skip("needs the real pairs: set DIFFPRUNE_TEST_DATA to their folder")
    return Path(folder)
