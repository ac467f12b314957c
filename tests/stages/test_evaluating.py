"""What is said before models are trained to judge a choice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.config import parse_config
from pipeline.stages.evaluating import _warn_of_shared_shards


def test_measuring_on_pairs_that_were_used_is_said(
    make_shards: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(shards=4)
    config = parse_config({"data": {"shards": shards[:2]}, "evaluate": {"shards": shards[2:]}})
    _warn_of_shared_shards(config)
    assert capsys.readouterr().err == ""
    shared = parse_config(
        {
            "data": {"shards": shards[:2]},
            "target": {"kind": "shards", "shards": shards[2:]},
            "evaluate": {"shards": shards[1:]},
        }
    )
    _warn_of_shared_shards(shared)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"evaluate: 1 shard of evaluate.shards, {shards[1]} first, also named by data.shards")
    assert second.startswith(f"evaluate: 2 shards of evaluate.shards, {shards[2]} first, also named by target.shards")
