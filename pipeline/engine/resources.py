"""How many workers there are and what each of them asks Ray for; defaults that fit the machines found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import EngineConfig

#: Without GPUs a machine gets at most this many workers by default: each holds the model and its directions.
CPU_WORKERS_PER_NODE = 8


@dataclass(frozen=True)
class WorkerPlan:
    """Scoring actors: their number, and what Ray reserves for each."""

    workers: int
    cpus: float
    gpus: float
    memory: int | None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `ActorClass.options`."""
        reserved = {"memory": self.memory} if self.memory is not None else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **reserved}


def plan_workers(config: EngineConfig, nodes: list[dict[str, float]], *, may_grow: bool = False) -> WorkerPlan:
    """Decide the workers for `nodes`, the resources (`CPU`, `GPU`) of each machine that is alive.

    With `may_grow` as many again are asked for as there is room for. Those that find none are pending: an autoscaler
    adds machines for them, up to the cluster's own limit, and any other cluster leaves them pending.

    One actor per GPU where there are GPUs; otherwise a machine's CPUs are shared out evenly over at most
    `CPU_WORKERS_PER_NODE` actors. The result is never less than one worker: a cluster that still has no machine for
    it is asked for one.
    """
    has_gpus = any(node.get("GPU", 0) > 0 for node in nodes)
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(has_gpus)
    used = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) > 0] if gpus else nodes
    cpus = config.cpus_per_worker or _cpu_share(used, gpus)
    fitting = sum(_fits(node, cpus, gpus) for node in used)
    workers = config.workers or max(fitting, 1) * (2 if may_grow else 1)
    return WorkerPlan(workers, cpus, gpus, config.memory_per_worker)


def _cpu_share(nodes: list[dict[str, float]], gpus: float) -> float:
    """CPUs of a worker such that every machine's are shared out evenly; the smallest share decides."""
    shares = [
        node.get("CPU", 0) // (max(1, node["GPU"] // gpus) if gpus else min(node.get("CPU", 0), CPU_WORKERS_PER_NODE))
        for node in nodes
        if node.get("CPU", 0) >= 1
    ]
    return max(1.0, float(min(shares, default=1.0)))


def _fits(node: dict[str, float], cpus: float, gpus: float) -> int:
    by_cpu = int(node.get("CPU", 0) // cpus)
    return min(by_cpu, int(node.get("GPU", 0) // gpus)) if gpus else by_cpu
