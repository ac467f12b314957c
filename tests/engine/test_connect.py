"""Joining and starting Ray: only what was started is stopped, and trouble is one line."""

from __future__ import annotations

import pytest
import ray

from pipeline.config import EngineConfig
from pipeline.engine.connect import alive_nodes, cluster_address, connect, node_is_alive
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
