"""What can be killed: Ray's processes that are at work, and whole nodes of a cluster on this machine."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tenacity import Retrying, stop_after_attempt

#: Titles of Ray's processes that run none of our work: idle workers, and a node's own agents (the node dies with them).
NOT_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def workers_of(*roots: int) -> list[int]:
    """Actor and task processes of Ray that descend from the processes `roots`; idle workers are left out."""
    titles = _descendants(*roots)
    return sorted(pid for pid, title in titles.items() if title.startswith("ray::") and not title.startswith(NOT_WORK))


def kill(*pids: int) -> bool:
    """SIGKILL processes; whether any of them was still there."""
    found = False
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            found = True
    return found


def _descendants(*roots: int) -> dict[int, str]:
    """Command lines of all processes below `roots`, by process id."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def descends(pid: int) -> bool:
        while (parent := parents.get(pid)) is not None:
            if parent in roots:
                return True
            pid = parent
        return False

    return {pid: title for pid, title in titles.items() if descends(pid)}


class Nodes:
    """A Ray cluster of a head without CPUs and two machines with one CPU each, all on this host.

    Its files are in a temporary folder of its own: a `Cluster` names itself in Ray's temporary folder as the one that
    a bare `ray.init()` joins, and removes that name when it ends. In the default folder other people's programs on
    this machine would join nodes that are about to be killed, and lose the name of their own cluster.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="chaos-")  # short: the paths of sockets in it are limited
        os.environ["RAY_TMPDIR"] = self._folder
        from ray.cluster_utils import Cluster

        # By default Ray takes a quarter of a minute to find out that a node is gone.
        sooner = {"health_check_period_ms": 1000}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": sooner}
        self._cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=True)
        self._nodes = [self._add() for _ in range(2)]
        self._due: float | None = None

    def _add(self) -> Any:
        # A busy machine may not start a node within the half minute that Ray allows.
        patient = Retrying(stop=stop_after_attempt(5), reraise=True)
        return patient(self._cluster.add_node, num_cpus=1, object_store_memory=100 << 20)

    @property
    def address(self) -> str:
        """For `RAY_ADDRESS`."""
        return str(self._cluster.address)

    def kill_one(self, generator: random.Random) -> None:
        """SIGKILL all processes of a machine; `tend` brings another one after a moment."""
        self.tend(now=True)
        node = self._nodes.pop(generator.randrange(len(self._nodes)))
        raylet = node.all_processes["raylet"][0].process.pid
        its_workers = _descendants(raylet)
        self._cluster.remove_node(node, allow_graceful=False)
        kill(*its_workers)
        self._due = time.monotonic() + generator.uniform(0, 3)

    def tend(self, now: bool = False) -> None:
        """Start the machine that replaces a killed one if its time has come."""
        if self._due is not None and (now or time.monotonic() >= self._due):
            self._due = None
            self._nodes.append(self._add())

    def close(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(self._folder, ignore_errors=True)
