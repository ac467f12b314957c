"""Which shards a config means: patterns, globs, lists and files of URLs become one list of URLs."""

from __future__ import annotations

import glob
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import braceexpand

from pipeline.config import Config
from pipeline.data.stream import SUFFIXES, patiently
from pipeline.errors import ConfigError
from pipeline.store import storage

#: Names that one pattern may stand for: billions of pairs have millions of shards, and a typing error more.
MOST_SHARDS = 10_000_000


def expand(shards: str | list[str], key: str = "data.shards") -> list[str]:
    """The URLs that `shards` names, in the order given (those of a glob sorted).

    Takes brace patterns, globs, local folders (the tars in them), `.txt` files with one pattern per line (`#` starts a
    comment), patterns joined by `::`, and lists of all these; paths (made absolute) and fsspec URLs. Raises
    `ConfigError` naming the pattern that matches nothing, a file that is missing or is no tar, or a shard that is named
    twice. Web addresses are not asked for here.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    urls = [url for pattern in patterns for url in _expand(pattern, key)]
    if not urls:
        raise ConfigError("expected shards, no pattern given", key=key, found=shards)
    twice, count = Counter(urls).most_common(1)[0]
    if count > 1:
        raise ConfigError("expected each shard once, this one is listed twice", key=key, found=twice)
    return urls


def also_measured_on(config: Config) -> dict[str, set[str]]:
    """The shards of `evaluate.shards` that the scores or the target are made of too, by the key that names them."""
    if config.evaluate is None or config.evaluate.shards is None:
        return {}
    measured = set(expand(config.evaluate.shards, "evaluate.shards"))
    others = {"data.shards": config.data.shards, "target.shards": config.target.shards}
    shared = {key: measured & set(expand(shards, key)) for key, shards in others.items() if shards is not None}
    return {key: found for key, found in shared.items() if found}


def _expand(pattern: str, key: str, within: tuple[str, ...] = ()) -> Iterator[str]:
    """The URLs of a pattern in the last of the text files `within`, each of which names the next one."""
    for part in filter(None, (part.strip() for part in pattern.split("::"))):
        if part.endswith(".txt"):
            if part in within:
                raise ConfigError("expected a text file of shard URLs that does not name itself", key=key, found=part)
            for line in _lines(part, key):
                yield from _expand(line, key, (*within, part))
            continue
        if (named := _count_names(part)) > MOST_SHARDS:
            raise ConfigError(f"expected at most {MOST_SHARDS:,} shards, this names {named:,}", key=key, found=part)
        try:
            names = list(braceexpand.braceexpand(part))
        except ValueError:
            raise ConfigError("expected balanced braces", key=key, found=part) from None
        found = [url for name in names for url in _matches(name, key)]
        _check(found, part, key)
        yield from found


def _count_names(pattern: str) -> int:
    """How many names the ranges of numbers in a brace pattern make, without making them."""
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}", pattern)
    return math.prod(abs(int(last) - int(first)) // max(abs(int(step or 1)), 1) + 1 for first, last, step in ranges)


def _lines(url: str, key: str) -> list[str]:
    _filesystem(url, key)
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")  # Windows begins files with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a readable text file of shard URLs: {error}", key=key, found=url) from None
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    if not any(lines):
        raise ConfigError("expected one shard URL per line, the file has none", key=key, found=url)
    return [line for line in lines if line]


def _matches(name: str, key: str) -> list[str]:
    """The shards that a glob or a local folder names, or `name` itself."""
    if storage.is_local(name):
        path = storage.local_path(name)
        if os.path.isdir(path):
            path = os.path.join(glob.escape(path), "*")
        elif not os.path.exists(path) and not path.endswith(SUFFIXES) and not glob.has_magic(path):
            return []
        elif not glob.has_magic(path) or os.path.exists(path):
            return [os.path.abspath(path)]
        path = os.path.abspath(path)
        return sorted(match for match in glob.glob(path, recursive=True) if match.endswith(SUFFIXES))
    web = name.startswith(("http://", "https://"))
    # In a web address a question mark begins the query.
    if not ("*" in name or (not web and glob.has_magic(name))):
        return [name]
    fs, path = _filesystem(name, key)
    matches = patiently(name, lambda: fs.glob(path))
    return sorted(_url_of(match, name, path) for match in matches if match.endswith(SUFFIXES))


def _url_of(match: str, pattern: str, path: str) -> str:
    """The URL of what a glob found: the host of `pattern` is no part of its `path` on every filesystem."""
    same = next((n for n in range(len(path)) if pattern[-n - 1 :] != path[-n - 1 :]), len(path))
    return pattern[: len(pattern) - same] + match[len(path) - same :]


def _filesystem(url: str, key: str) -> tuple[Any, str]:
    try:
        return storage.filesystem(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"expected a URL that can be read here: {error}", key=key, found=url) from None


def _check(urls: list[str], pattern: str, key: str) -> None:
    """Raise `ConfigError` unless `urls` are tars that are there (web addresses are not asked for)."""
    if not urls:
        folder = storage.is_local(pattern) and os.path.isdir(storage.local_path(pattern))
        nothing = f"this folder has no {', '.join(SUFFIXES)}" if folder else "no file matches the pattern"
        command = f"tar --sort=name -cf 00000.tar -C {shlex.quote(storage.local_path(pattern))} ."
        hint = f" (put images and captions into one: {command})" if folder else ""
        raise ConfigError(f"expected shards, {nothing}{hint}", key=key, found=pattern)
    for url in urls:
        if not storage.basename(url).endswith(SUFFIXES):
            raise ConfigError(f"expected names ending in {', '.join(SUFFIXES)}", key=key, found=url)
        if not _is_text(url):
            raise ConfigError("expected names in UTF-8", key=key, found=url)
    missing = _missing(urls, key)
    if len(missing) == len(urls):
        raise ConfigError("expected shards, no file matches the pattern", key=key, found=pattern)
    if missing:
        several = f" ({len(missing)} of {len(urls)} are missing)" if len(missing) > 1 else ""
        raise ConfigError(f"expected every shard of {pattern!r} to be there{several}", key=key, found=missing[0])


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8: other bytes are kept as characters that no text has."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing(urls: list[str], key: str) -> list[str]:
    missing = [url for url in urls if storage.is_local(url) and not os.path.isfile(storage.local_path(url))]
    remote = [url for url in urls if not storage.is_local(url) and not url.startswith(("http://", "https://"))]
    # One listing per folder instead of one question per shard.
    listed: dict[str, set[str]] = {}
    for url in remote:
        fs, path = _filesystem(url, key)
        folder = url.rpartition("/")[0]
        if folder not in listed:
            listed[folder] = patiently(url, partial(_names, fs, path.rpartition("/")[0]))
        if path.strip("/") not in listed[folder]:
            missing.append(url)
    return missing


def _names(fs: Any, folder: str) -> set[str]:
    try:
        return {entry.strip("/") for entry in fs.ls(folder, detail=False)}
    except FileNotFoundError:
        return set()
