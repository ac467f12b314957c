"""Which versions of files a result is of. Storage may hang, so it is asked in tasks: the driver goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.config import EngineConfig
from pipeline.data.inventory import ShardInfo, changed_shards, versions
from pipeline.data.shards import expand
from pipeline.engine.tasks import run_task
from pipeline.patience import Patience

Item = TypeVar("Item")
Answer = TypeVar("Answer")

#: File name, bytes, and etag or time of change.
Version = tuple[str, int, str]


def versions_of(urls: Sequence[str], stage: str, engine: EngineConfig) -> list[Version]:
    """The version of each file. Raises `InputError` for one that is not there, `StageError` when storage hangs."""
    return _asked(_versions, urls, stage, engine) if urls else []


def shard_versions(shards: str | list[str] | None, key: str, stage: str, engine: EngineConfig) -> list[Version]:
    """Those of the shards that a config names under `key`; none for None."""
    return versions_of(expand(shards, key), stage, engine) if shards is not None else []


def changed_since(known: Sequence[ShardInfo], stage: str, engine: EngineConfig) -> list[tuple[ShardInfo, str]]:
    """`changed_shards` of these. Raises as `versions_of`."""
    return _asked(_changed, known, stage, engine)


def _asked(
    function: Callable[[Sequence[Item]], list[Answer]], items: Sequence[Item], stage: str, engine: EngineConfig
) -> list[Answer]:
    patience = Patience.of_computing(engine.task_timeout)
    return run_task(function, items, stage=stage, config=engine, patience=patience)


def _versions(urls: Sequence[str]) -> list[Version]:
    return list(versions(urls))


def _changed(known: Sequence[ShardInfo]) -> list[tuple[ShardInfo, str]]:
    return list(changed_shards(known))
