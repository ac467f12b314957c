"""Files by path and by URL behave alike: whole or absent, listed without what is half-written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.store import storage
from tests.conftest import Bucket


@pytest.fixture(params=["path", "file-url", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder: a path, a `file://` URL, and a filesystem that is not local."""
    if request.param == "memory":
        yield "memory://store"
        fs = fsspec.filesystem("memory")
        if fs.exists("/store"):
            fs.rm("/store", recursive=True)
    else:
        yield f"file://{tmp_path}" if request.param == "file-url" else str(tmp_path)


def break_off(url: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Write half of a file and be interrupted."""
    with storage.atomic_writer(url) as handle:
        handle.write(b"half")
        meanwhile()
        raise KeyboardInterrupt


def test_what_is_written_is_read_back(root: str) -> None:
    url = storage.join(root, "deep", "er", "a.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"first")
    storage.write_bytes(url, b"second")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"second"
    assert storage.size(url) == 6
    with storage.open_read(url) as handle:
        assert handle.read(3) == b"sec"
    assert storage.file_checksum(url, block_bytes=4) == storage.checksum(b"second")
    assert storage.checksum(b"second") == hashlib.blake2b(b"second", digest_size=16).hexdigest()
    storage.remove(url)
    assert not storage.exists(url)
    storage.remove(url)
    with pytest.raises(FileNotFoundError):
        storage.size(url)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)


def test_a_file_that_another_process_removes_first_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os.path, "exists", lambda path: True)
    storage.remove(str(tmp_path / "gone"))


def test_json_keeps_its_order_and_refuses_what_is_none(root: str) -> None:
    url = storage.join(root, "a.json")
    storage.write_json(url, {"b": 1, "a": [2.5, None]})
    assert storage.read_bytes(url) == b'{\n  "b": 1,\n  "a": [\n    2.5,\n    null\n  ]\n}\n'
    assert list(storage.read_json(url)) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(url, {"a": float("nan")})
    assert storage.read_json(url) == {"b": 1, "a": [2.5, None]}


def test_a_stream_becomes_a_file_only_when_it_ends_well(root: str) -> None:
    url = storage.join(root, "deep", "a.bin")
    storage.write_bytes(url, b"before")
    with pytest.raises(KeyboardInterrupt):
        break_off(url)
    assert storage.read_bytes(url) == b"before"
    assert storage.list_files(storage.join(root, "deep")) == [url]
    with storage.atomic_writer(url) as handle:
        handle.write(b"af")
        handle.write(b"ter")
    assert storage.read_bytes(url) == b"after"
    assert storage.list_files(storage.join(root, "deep")) == [url]


def test_a_local_stream_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    seen: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        break_off(str(tmp_path / "a"), lambda: seen.extend(tmp_path.iterdir()))
    assert [path.name.startswith(storage.TEMPORARY_PREFIX) for path in seen] == [True]
    assert list(tmp_path.iterdir()) == []


def test_lists_hold_files_of_one_folder_sorted(root: str) -> None:
    assert storage.list_files(storage.join(root, "absent")) == []
    storage.make_folder(storage.join(root, "a"))
    for name in ("b.json", "a.json", "c.txt", f"{storage.TEMPORARY_PREFIX}1-d.json", "below/e.json"):
        storage.write_bytes(storage.join(root, "a", name), b"")
    folder = storage.join(root, "a")
    assert storage.list_files(folder, ".json") == [f"{folder}/a.json", f"{folder}/b.json"]
    assert storage.list_files(folder) == [f"{folder}/a.json", f"{folder}/b.json", f"{folder}/c.txt"]


def test_a_list_of_an_object_store_is_not_kept(s3_bucket: Bucket) -> None:
    url = storage.join(s3_bucket.url, "a", "b.json")
    storage.write_bytes(url, b"")
    assert storage.list_files(storage.join(s3_bucket.url, "a")) == [url]
    assert not len(storage.filesystem(url)[0].dircache)
    storage.remove_folder(storage.join(s3_bucket.url, "a"))
    assert not storage.exists(url)


def test_a_folder_goes_with_everything_in_it(root: str) -> None:
    folder = storage.join(root, "a")
    for name in ("b.json", "below/c.json"):
        storage.write_bytes(storage.join(folder, name), b"")
    storage.write_bytes(storage.join(root, "ab.json"), b"")
    storage.remove_folder(folder)
    storage.remove_folder(folder)
    assert not storage.exists(folder)
    assert storage.list_files(root) == [storage.join(root, "ab.json")]


@pytest.mark.parametrize(
    ("url", "local", "last"),
    [
        ("/a/b.tar", True, "b.tar"),
        ("file:///a/b.tar", True, "b.tar"),
        ("s3://bucket/a/b.tar", False, "b.tar"),
        ("https://host/b.tar?token=x/y", False, "b.tar"),
        ("/a/what?.tar", True, "what?.tar"),
    ],
)
def test_parts_of_a_url(url: str, local: bool, last: str) -> None:
    assert (storage.is_local(url), storage.basename(url)) == (local, last)


def test_paths_are_joined_with_single_slashes() -> None:
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.join("/", "a") == "/a"
    assert storage.local_path("file:///a/b") == storage.local_path("/a/b") == "/a/b"


def test_what_another_process_does_is_seen_after_a_listing(s3_bucket: Bucket) -> None:
    import s3fs

    other = s3fs.S3FileSystem(skip_instance_cache=True)
    folder = f"{s3_bucket.url}/run"
    old, new = (storage.join(folder, name) for name in ("old.json", "new.json"))
    storage.write_json(old, 1)
    assert storage.list_files(folder) == [old]
    other.pipe_file(new, b"2")
    assert storage.read_json(new) == 2
    assert storage.list_files(folder) == [new, old]
    other.pipe_file(old, b'"longer"')
    assert storage.size(old) == 8
    assert storage.list_files(folder) == [new, old]
    other.pipe_file(old, b'"longer still"')
    assert storage.read_json(old) == "longer still"
    assert storage.list_files(folder) == [new, old]
    other.pipe_file(old, b'"short"')
    with storage.open_read(old) as handle:
        assert handle.read() == b'"short"'
    assert storage.list_files(folder) == [new, old]
    third = storage.join(folder, "third.json")
    other.pipe_file(third, b"3")
    storage.remove(third)
    other.invalidate_cache()
    assert not other.exists(third)
    other.rm_file(new)
    with pytest.raises(FileNotFoundError):
        storage.read_json(new)
    storage.remove(new)


def test_nothing_is_listed_to_read_or_remove_a_file(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    url = storage.join(s3_bucket.url, "mark.json")
    storage.write_json(url, 1)
    asked: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def noted(self: Any, method: str, *args: Any, **options: Any) -> Any:
        asked.append(method)
        return await call(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    assert storage.read_json(url) == 1
    storage.remove(url)
    assert asked == ["head_object", "get_object", "delete_object"]
