"""Errors of storage that is away, told from those that asking again does not change."""

from __future__ import annotations

import errno
from pathlib import Path

import aiohttp
import pytest
import s3fs
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from pipeline.data import stream
from pipeline.data.stream import ShardStream
from pipeline.engine.failures import Failure, SampleError
from pipeline.engine.outage import OutageWatch, has_no_answer
from pipeline.errors import InputError, StageError
from tests.conftest import Bucket
from tests.helpers import Fault, FaultProxy, write_shards
from tests.web import WebServer


def client_error(status: int) -> ClientError:
    return ClientError({"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def web_error(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "I/O error"), True),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (EndpointConnectionError(endpoint_url="x"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError(), True),
        (client_error(503), True),
        (client_error(429), True),
        (web_error(500), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError("torn"), False),
        (ValueError(), False),
        (NoCredentialsError(), False),
        (client_error(404), False),
        (web_error(403), False),
    ],
)
def test_what_counts_as_no_answer(error: Exception, away: bool) -> None:
    assert has_no_answer(error) == away
    try:
        raise InputError("s3://bucket/00000.tar: cannot be read") from error
    except InputError as outer:
        wrapped = SampleError("000007")
        wrapped.__cause__ = outer
        assert Failure.of(wrapped).no_answer == away


def test_the_first_answer_of_a_server_counts() -> None:
    """fsspec says that a file is not there for any error of a web server; s3fs makes an `OSError` of a 404."""
    gone = FileNotFoundError("x")
    gone.__cause__ = web_error(502)
    assert has_no_answer(gone)
    gone.__cause__ = client_error(404)
    assert not has_no_answer(gone)


def failure_of(url: str) -> Failure:
    with pytest.raises(InputError) as raised:
        ShardStream(url).read(1 << 20)
    return Failure.of(raised.value)


def test_files_that_are_missing_and_web_servers_that_are_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(stream, "ATTEMPTS", 1)
    assert not failure_of(str(tmp_path / "00000.tar")).no_answer
    with WebServer(tmp_path) as web:
        assert not failure_of(f"{web.url}/00000.tar").no_answer
    assert failure_of(f"{web.url}/00000.tar").no_answer


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_an_object_store_that_is_away(
    tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    (url,) = s3_bucket.put(write_shards(tmp_path, shards=1, samples=24)[0])
    monkeypatch.setattr(stream, "ATTEMPTS", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert not failure_of(f"{s3_bucket.url}/00001.tar").no_answer
    with FaultProxy(s3_bucket.endpoint, lambda *_: fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        failure = failure_of(url)
    assert failure.no_answer
    s3fs.S3FileSystem.clear_instance_cache()
    assert failure_of(url).no_answer, "nobody listens there any more"


def test_an_outage_is_told_once_and_ends_the_stage_when_it_is_too_long() -> None:
    said: list[str] = []
    watch = OutageWatch("score", 100.0, said.append)
    watch.look(0.0)
    watch.unanswered("InputError: 00001.tar: cannot be read")
    for seconds in (1.0, 50.0, 99.0):
        watch.look(seconds)
    assert said == ["storage does not answer, which is tried again for 2 min: InputError: 00001.tar: cannot be read"]
    watch.look(0.0)
    watch.look(0.0)
    assert said[1:] == ["storage answers again"]
    with pytest.raises(StageError, match=r"score: storage has not answered for 2 min: InputError: 00001\.tar"):
        watch.look(101.0)
