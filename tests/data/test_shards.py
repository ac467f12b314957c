"""Every form in which shards can be named, and what is said when they are not there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import fsspec
import pytest
from fsspec import AbstractFileSystem

from pipeline.data import shards
from pipeline.data.reader import ShardReader
from pipeline.data.shards import expand
from pipeline.errors import ConfigError
from tests.conftest import Bucket
from tests.helpers import sample_members, write_shards, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, shards=3, samples=1)
    write_tar(tmp_path / "more" / "b.tar.zst", sample_members("x", b"", "y"))
    write_tar(tmp_path / "more" / "a.tar.gz", sample_members("x", b"", "y"))
    write_tar(tmp_path / "more" / "c.tgz", sample_members("x", b"", "y"))
    (tmp_path / "more" / "truth.csv").write_text("not a shard")
    return tmp_path


def names(urls: list[str]) -> list[str]:
    return [os.path.basename(url) for url in urls]


def test_brace_pattern(folder: Path) -> None:
    assert expand(f"{folder}/{{00000..00002}}.tar") == [f"{folder}/{number:05d}.tar" for number in range(3)]


def test_glob_is_sorted_and_takes_only_tars(folder: Path) -> None:
    assert names(expand(f"{folder}/more/*")) == ["a.tar.gz", "b.tar.zst", "c.tgz"]
    assert names(expand(f"{folder}/**/*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_folder_means_the_tars_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(expand(f"{folder}/more")) == ["a.tar.gz", "b.tar.zst", "c.tgz"]
    (folder / "more").rename(folder / "more[1]")
    assert names(expand(f"{folder}/more[1]/")) == ["a.tar.gz", "b.tar.zst", "c.tgz"]
    monkeypatch.chdir(folder)
    assert expand(".") == [f"{folder}/{number:05d}.tar" for number in range(3)]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_the_command_that_is_hinted_at_makes_a_shard_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = tmp_path / "my pairs"
    pairs.mkdir()
    for name in ("a", "a-1", "b"):
        for ending in ("jpg", "txt"):
            (pairs / f"{name}.{ending}").write_text(name)
    with pytest.raises(ConfigError, match="this folder has no") as error:
        expand(str(pairs))
    command = re.search(r"\(.*: (tar .*)\)", str(error.value))
    assert command is not None
    made = subprocess.run(shlex.split(command[1]), check=False, capture_output=True, text=True)
    if "--sort" in made.stderr:
        pytest.skip("this tar does not sort")
    with ShardReader("00000.tar") as reader:
        found = [(os.path.basename(sample.key), sample.image, sample.caption) for sample in reader]
    assert found == [(name, name.encode(), name) for name in ("a-1", "a", "b")]


def test_list_keeps_its_order(folder: Path) -> None:
    assert names(expand([f"{folder}/00002.tar", f"{folder}/more/*.tgz", f"{folder}/00000.tar"])) == [
        "00002.tar",
        "c.tgz",
        "00000.tar",
    ]


def test_joined_patterns(folder: Path) -> None:
    assert names(expand(f"{folder}/0000{{1,2}}.tar::{folder}/more/a*")) == ["00001.tar", "00002.tar", "a.tar.gz"]


def test_text_file_of_urls(folder: Path) -> None:
    (folder / "list.txt").write_text(f"# ours\n{folder}/00001.tar\n\n{folder}/more/{{a.tar.gz,c.tgz}}  # two\n")
    assert names(expand(f"{folder}/list.txt::{folder}/00000.tar")) == ["00001.tar", "a.tar.gz", "c.tgz", "00000.tar"]


def test_a_text_file_may_begin_with_a_mark_but_not_name_itself(folder: Path) -> None:
    (folder / "list.txt").write_text(f"{folder}/00001.tar\n", encoding="utf-8-sig")
    assert names(expand(f"{folder}/list.txt")) == ["00001.tar"]
    for name, other in (("a", "b"), ("b", "a")):
        (folder / f"{name}.txt").write_text(f"{folder}/{other}.txt\n")
    with pytest.raises(ConfigError, match=r"does not name itself, found .*/a\.txt"):
        expand(f"{folder}/a.txt")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    shutil.copy(write_tar(tmp_path / "a.tar", sample_members("x", b"", "y")), os.fsencode(tmp_path) + b"/\xff.tar")
    with pytest.raises(ConfigError, match=r"data\.shards: expected names in UTF-8, found .*udcff\.tar"):
        expand(f"{tmp_path}/*.tar")


def test_file_url_and_name_with_glob_characters(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "odd[1].tar", sample_members("x", b"", "y"))
    assert expand(path) == [path]
    assert expand(f"file://{path}") == [path]


def test_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert expand("0000*.tar") == expand("{00000..00002}.tar") == [f"{folder}/{number:05d}.tar" for number in range(3)]


def test_web_addresses_are_not_asked_for() -> None:
    url = "https://data.example/{000..001}.tar?signature=a"
    assert expand(url) == [f"https://data.example/{number:03d}.tar?signature=a" for number in range(2)]


def test_memory_and_s3_urls(s3_bucket: Bucket, folder: Path) -> None:
    urls = s3_bucket.put(*sorted(folder.glob("*.tar")))
    assert expand(f"{s3_bucket.url}/{{00000..00002}}.tar") == urls
    assert expand(f"{s3_bucket.url}/*.tar") == urls
    with pytest.raises(ConfigError, match=r"2 of 5 are missing.*00003\.tar"):
        expand(f"{s3_bucket.url}/{{00000..00004}}.tar")
    with pytest.raises(ConfigError, match=r"no file matches.*nothing-\*\.tar"):
        expand(f"{s3_bucket.url}/nothing-*.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/none-*.tar", r"no file matches.*none-\*\.tar"),
        ("{folder}/{{00007..00009}}.tar", r"no file matches.*\{00007\.\.00009\}\.tar"),
        ("{folder}/{{00001..00004}}.tar", r"every shard of .*2 of 4 are missing.*00003\.tar"),
        ("{folder}/more/truth.csv", r"names ending in \.tar"),
        ("{folder}/00000.tar::{folder}/0000*.tar", r"listed twice.*00000\.tar"),
        ("{folder}/{{0..1.tar", r"no file matches|balanced braces"),
        ("{folder}/{{0..9}}/{{0000..999999999}}.tar", r"at most 10,000,000 shards, this names 10,000,000,000"),
        ("{folder}/{{99999999..0..-2}}.tar", r"at most 10,000,000 shards, this names 50,000,000"),
        ("{folder}/absent.txt", r"readable text file.*absent\.txt"),
        ("nosuch://bucket/*.tar", r"can be read here"),
        ("nosuch://bucket/list.txt", r"can be read here"),
        ("", "no pattern given"),
    ],
)
def test_errors_name_key_and_pattern_on_one_line(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        expand(pattern.format(folder=folder), key="target.shards")
    assert str(caught.value).startswith("target.shards: expected")
    assert "\n" not in str(caught.value)


class Hosted(AbstractFileSystem):
    """As HDFS has it: the host belongs to the filesystem, the paths in it do not name it."""

    protocol = "hosted"
    files: ClassVar = {"one:9000": "/in/0.tar", "two:9000": "/in/1.tar"}

    def __init__(self, host: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.host = host

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return urlsplit(path).path.rstrip("/") if "://" in path else path.rstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"host": urlsplit(path).netloc}

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        file = self.files[self.host]
        entries = {
            "": {"name": "/in", "size": 0, "type": "directory"},
            "/in": {"name": file, "size": 0, "type": "file"},
        }
        found = entries[path.rstrip("/")]
        return [found if detail else found["name"]]


def test_a_glob_keeps_the_host() -> None:
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    assert expand("hosted://one:9000/in/*.tar") == ["hosted://one:9000/in/0.tar"]
    both = ["hosted://one:9000/in/0.tar", "hosted://two:9000/in/1.tar"]
    assert expand(both) == expand("hosted://one:9000/i*/[0-9].tar::hosted://two:9000/in/*.tar") == both
    with pytest.raises(ConfigError, match=r"1\.tar"):
        expand(f"{both[0]}::hosted://one:9000/in/1.tar")


@pytest.mark.parametrize(
    ("pattern", "path", "match", "url"),
    [
        ("s3://b/in/*.tar", "b/in/*.tar", "b/in/0.tar", "s3://b/in/0.tar"),
        ("abfs://b@acc.host/in/*.tar", "b/in/*.tar", "b/in/0.tar", "abfs://b@acc.host/in/0.tar"),
        ("hdfs://h:1/in/*.tar", "/in/*.tar", "/in/0.tar", "hdfs://h:1/in/0.tar"),
        ("http://h/in/*.tar", "http://h/in/*.tar", "http://h/in/0.tar", "http://h/in/0.tar"),
    ],
)
def test_the_url_of_a_match(pattern: str, path: str, match: str, url: str) -> None:
    assert shards._url_of(match, pattern, path) == url
