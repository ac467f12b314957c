"""Shards on web servers: read whole and in order, or an error that says what the server did."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.data import stream
from pipeline.data.inventory import inspect_shard
from pipeline.data.reader import read_shard
from pipeline.data.shards import expand
from pipeline.errors import InputError
from tests.helpers import FaultProxy, write_shards
from tests.web import WebServer


@pytest.fixture(autouse=True)
def small_and_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 16 << 10)
    monkeypatch.setattr(stream, "ATTEMPTS", 3)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, shards=2, samples=24)
    return tmp_path


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    with WebServer(folder) as server:
        yield server


def keys_of(url: str) -> list[str]:
    with read_shard(url) as reader:
        keys = [sample.key for sample in reader]
    assert reader.end_error == ""
    return keys


KEYS = [f"{number:08d}" for number in range(24)]


def test_a_shard_is_read_by_ranges(web: WebServer, folder: Path) -> None:
    assert keys_of(f"{web.url}/00000.tar") == KEYS
    size = (folder / "00000.tar").stat().st_size
    blocks = [f"bytes={start}-{min(start + (16 << 10), size) - 1}" for start in range(0, size, 16 << 10)]
    assert [asked for method, asked in web.asked if method == "GET"] == ["bytes=0-0", *blocks]


def test_a_server_without_ranges_sends_the_shard_once(folder: Path) -> None:
    with WebServer(folder, ranges=False) as web:
        assert keys_of(f"{web.url}/00000.tar") == KEYS
        assert [asked for method, asked in web.asked if method == "GET"] == ["bytes=0-0", ""]


def test_a_server_without_ranges_that_breaks_off_is_an_error(folder: Path) -> None:
    with (
        WebServer(folder, ranges=False, cut=20_000) as web,
        # Which of the two, and whether at once, depends on whether the cut is seen with the first bytes or after them.
        pytest.raises(InputError, match=r"00000\.tar: (broke off after \d+|cannot be read: .*not completed)"),
        read_shard(f"{web.url}/00000.tar") as reader,
    ):
        list(reader)


@pytest.mark.parametrize("kind", ["503", "cut", "short", "slow"])
def test_passing_faults_are_overcome(web: WebServer, kind: str) -> None:
    with FaultProxy(web.url, lambda method, path, number: kind if number % 3 == 0 else "ok") as proxy:
        assert keys_of(f"{proxy.url}/00000.tar") == KEYS
        assert proxy.faults > 1


@pytest.mark.parametrize(
    ("kind", "told"), [("503", "503"), ("cut", "cannot be read"), ("short", "asked for 16384 bytes at 16384, got 8192")]
)
def test_lasting_faults_raise_and_never_shorten_the_shard(web: WebServer, kind: str, told: str) -> None:
    with FaultProxy(web.url, lambda method, path, number: kind if number > 2 else "ok") as proxy:
        url = f"{proxy.url}/00000.tar"
        with read_shard(url) as reader, pytest.raises(InputError, match=rf"00000\.tar: .*{told}"):
            assert len(list(reader)) < 24
        assert proxy.faults == 3


def test_what_is_not_there_is_told_at_once(web: WebServer) -> None:
    for ask in (read_shard, lambda url: inspect_shard(0, url)):
        web.asked.clear()
        with pytest.raises(InputError, match=r"absent\.tar: cannot be read: 404"):
            ask(f"{web.url}/absent.tar")
        assert len(web.asked) <= 2


def test_a_server_that_is_down_is_asked_again(folder: Path) -> None:
    with WebServer(folder) as web:
        url = f"{web.url}/00000.tar"
        down: Callable[[str, str, int], str] = lambda method, path, number: "503" if number < 4 else "ok"  # noqa: E731
        with FaultProxy(web.url, down) as proxy:
            assert inspect_shard(0, f"{proxy.url}/00000.tar").samples == 24
    with pytest.raises(InputError, match=r"00000\.tar: cannot be read: Cannot connect to host 127\.0\.0\.1"):
        inspect_shard(0, url)


def test_a_changed_file_has_another_version(web: WebServer, folder: Path) -> None:
    """By the time of change, where the server gives no etag."""
    url = f"{web.url}/00000.tar"
    before = inspect_shard(0, url)
    assert (before.samples, before.bytes) == (24, (folder / "00000.tar").stat().st_size)
    assert before.etag
    os.utime(folder / "00000.tar", (1, 1))
    after = inspect_shard(0, url)
    assert after.etag != before.etag


def test_compressed_shards_with_a_query_and_globs(web: WebServer, folder: Path) -> None:
    write_shards(folder, shards=1, samples=24, suffix=".tar.gz")
    url = f"{web.url}/00000.tar.gz?token=1"
    assert keys_of(url) == KEYS
    assert inspect_shard(0, url).name == "00000.tar.gz"
    assert expand(f"{web.url}/*.tar") == [f"{web.url}/0000{number}.tar" for number in range(2)]
