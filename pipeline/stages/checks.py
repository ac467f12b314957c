"""What can be found wrong with a config before any work is done."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.data.shards import expand
from pipeline.errors import ConfigError
from pipeline.replay.schedule import check_schedule
from pipeline.stages.choices import check_choices
from pipeline.stages.job import is_demo
from pipeline.stages.training import check_checkpoints, check_held_out
from pipeline.store import storage


def check_given(config: Config) -> None:
    """Check that what a config names is there and fits together. Raises `ConfigError`."""
    _check_out(config.out)
    given = {"data.shards": config.data.shards, "target.shards": config.target.shards}
    if config.evaluate is not None:
        given["evaluate.shards"] = config.evaluate.shards
    for key, shards in given.items():
        if shards is not None and not is_demo(shards):
            expand(shards, key)
    truth = config.evaluate.truth if config.evaluate is not None else None
    if truth and not is_demo(truth) and not storage.exists(truth):
        raise ConfigError("expected a CSV file", key="evaluate.truth", found=truth)
    check_checkpoints(config)
    check_held_out(config)


def _check_out(out: str) -> None:
    """Check that the storage can be used here, and that `out` names something in it. Raises `ConfigError`."""
    try:
        _, path = storage.filesystem(out)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"expected a path or URL that can be used here: {error}", key="out", found=out) from None
    if not out or (not storage.is_local(out) and not path.strip("/")):
        raise ConfigError("expected a folder, on an object store one in a bucket", key="out", found=out)


def check_ahead(config: Config) -> None:
    """Check, before there are scores, that the stages up to the selection can be done. Raises `ConfigError`."""
    if config.proxy.checkpoints is None:
        check_schedule(config.proxy)
    check_choices(config)
