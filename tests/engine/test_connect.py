"""Joining and starting Ray: only what was started is stopped, and trouble is one line."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import ray

from pipeline.config import EngineConfig
from pipeline.engine.connect import OBJECT_STORE_BYTES, alive_nodes, cluster_address, connect, node_is_alive
from pipeline.errors import StageError


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_connection_that_exists_is_used_and_left_alone() -> None:
    with connect(EngineConfig(address="203.0.113.1:1")):
        assert sum(node["CPU"] for node in alive_nodes()) == 2
    assert ray.is_initialized()
    assert node_is_alive(ray.get_runtime_context().get_node_id())
    assert not node_is_alive("0" * 56)


@pytest.mark.parametrize("from_environment", [False, True])
def test_where_ray_is_looked_for(monkeypatch: pytest.MonkeyPatch, from_environment: bool) -> None:
    asked: list[str | None] = []

    def init(**options: object) -> None:
        asked.append(str(options["address"]))
        raise ConnectionError("nobody\nthere")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if from_environment:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for address in (None, "10.0.0.2:6379"):
        with (
            pytest.raises(StageError, match=r"cannot be reached: nobody there"),
            connect(EngineConfig(address=address)),
        ):
            pass
        assert cluster_address(EngineConfig(address=address)) == (
            address or ("10.0.0.1:6379" if from_environment else None)
        )
    assert asked == ["10.0.0.1:6379" if from_environment else "local", "10.0.0.2:6379"]


@pytest.mark.parametrize("given", [None, 1 << 30])
def test_an_own_ray_gets_the_object_store_of_the_config_and_ends_with_the_block(
    monkeypatch: pytest.MonkeyPatch, given: int | None
) -> None:
    asked: list[dict[str, object]] = []
    ended: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def work() -> None:
        with connect(EngineConfig(object_store_memory=given)):
            assert not ended
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [options["object_store_memory"] for options in asked] == [given or OBJECT_STORE_BYTES]
    assert ended == [True]
