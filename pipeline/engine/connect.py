"""Joining a Ray cluster, or starting a local one; only what was started here is stopped again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.config import EngineConfig
from pipeline.engine.progress import say
from pipeline.errors import StageError

#: The engine keeps nothing but small messages in the object store, so a Ray started here gets little of it.
OBJECT_STORE_BYTES = 256 << 20


@contextmanager
def connect(config: EngineConfig) -> Iterator[None]:
    """Be connected to Ray inside the block.

    In this order: a connection that exists already; `config.address`; the cluster of the job or `RAY_ADDRESS`; else
    a Ray on this machine alone, which ends with the block. Raises `StageError` when the cluster cannot be reached.
    SIGTERM then ends the block as Ctrl-C does.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address(config)
    try:
        if address is not None:
            say("engine", f"joining the Ray cluster at {address}")
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            say("engine", "starting Ray on this machine")
            _start_local(config)
    except Exception as error:  # Ray raises many types here, a bare Exception among them
        ray.shutdown()
        where = f"the Ray cluster at {address}" if address is not None else "a local Ray"
        raise StageError(f"engine: {where} cannot be reached: {' '.join(str(error).split())}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own exits, with one status or another
    try:
        yield
    finally:
        ray.shutdown()


def cluster_address(config: EngineConfig) -> str | None:
    """The cluster that is joined: `config.address`, else that of the job or `RAY_ADDRESS`; None for an own Ray."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return address if address and address != "local" else None


def _start_local(config: EngineConfig) -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=config.object_store_memory or OBJECT_STORE_BYTES,
    )


def alive_nodes() -> list[dict[str, float]]:
    """Resources (`CPU`, `GPU`, ...) of each machine of the cluster that is alive."""
    return [dict(node["Resources"]) for node in _nodes() if node["Alive"]]


def node_is_alive(node_id: str) -> bool:
    """Whether the machine with this Ray id is still part of the cluster."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in _nodes())


def reserved_here() -> tuple[dict[str, float], dict[str, float]]:
    """What Ray reserves for this task or actor, and what its machine has."""
    context = ray.get_runtime_context()
    here = context.get_node_id()
    machine = next((dict(node["Resources"]) for node in _nodes() if node["NodeID"] == here), {})
    return dict(context.get_assigned_resources()), machine  # type: ignore[no-untyped-call]


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes
