"""What decided a result: named values whose digest every commit mark carries, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.store import storage

#: How many differing values a message names.
NAMED_DIFFERENCES = 3

_ABSENT = "nothing"


@dataclass(frozen=True)
class Fingerprint:
    """Named parts (nested dictionaries, lists and plain values) that together decide a result.

    For scores the parts are `checkpoints` (digest of each file's content), `score` (the estimator and its settings),
    `reference` and `target` (digests of the pairs' ids), `preprocessing`, and `shard`, the identity of the input
    shard, which `of_shard` adds. Values are compared as JSON, so tuples equal lists.
    """

    parts: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-128 of the parts; it does not depend on the order of their keys."""
        return storage.checksum(json.dumps(self.parts, sort_keys=True, separators=(",", ":")).encode())

    def of_shard(self, name: str, size: int, etag: str) -> Fingerprint:
        """This fingerprint for one input shard: its file name, bytes, and etag or modification time."""
        return Fingerprint({**self.parts, "shard": {"name": name, "bytes": size, "etag": etag}})

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where the parts found on storage, `other`, differ: `key: VALUE there, VALUE now`, sorted by key."""
        now, there = dict(_leaves(self.parts)), dict(_leaves(other))
        return [
            f"{key}: {there.get(key, _ABSENT)} there, {now.get(key, _ABSENT)} now"
            for key in sorted(now.keys() | there.keys())
            if now.get(key) != there.get(key)
        ]


def name_differences(differences: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(differences) - NAMED_DIFFERENCES
    return "; ".join(differences[:NAMED_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every plain value of a nested structure with its dotted key, written as JSON."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and value:
        for number, child in enumerate(value):
            yield from _leaves(child, f"{prefix}[{number}]")
    else:
        yield prefix, json.dumps(value)
