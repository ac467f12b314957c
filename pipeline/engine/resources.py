"""How many workers there are and what each of them asks Ray for; defaults that fit the machines found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import EngineConfig

#: Without GPUs a machine gets at most this many workers by default: each holds the model and its directions.
CPU_WORKERS_PER_NODE = 8


@dataclass(frozen=True)
class WorkerPlan:
    """Scoring actors: their number, what Ray reserves for each, and how many fit the machines that are there."""

    workers: int
    cpus: float
    gpus: float
    memory: int | None
    fitting: int

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
    return WorkerPlan(workers, cpus, gpus, config.memory_per_worker, fitting)


def decode_threads(config: EngineConfig, assigned: dict[str, float], node: dict[str, float]) -> int:
    """Threads that decode in an actor: as the config says, else its CPUs. Where the config does not say how many these
    are, its share of its own machine's: what Ray reserves goes by the machine with the fewest.

    Args:
        config: the run's.
        assigned: what Ray reserves for the actor (`CPU`, `GPU`).
        node: what its machine has.
    """
    if config.decode_threads is not None:
        return config.decode_threads
    cpus = assigned.get("CPU", 1.0)
    if config.cpus_per_worker is None:
        cpus = max(cpus, node.get("CPU", 0.0) / max(_fits(node, cpus, assigned.get("GPU", 0.0)), 1))
    return max(1, int(cpus))


def _cpu_share(nodes: list[dict[str, float]], gpus: float) -> float:
    """CPUs of a worker such that every machine's are shared out evenly; the smallest share decides.

    A whole number, except where GPUs outnumber CPUs.
    """
    shares = []
    for node in nodes:
        cpus = node.get("CPU", 0.0)
        if cpus >= 1 or gpus:
            share = cpus / (max(1, _times(node["GPU"], gpus)) if gpus else min(cpus, CPU_WORKERS_PER_NODE))
            shares.append(float(int(share)) if share >= 1 else int(share * 10_000) / 10_000)  # as finely as Ray counts
    return min(shares, default=1.0)


def _fits(node: dict[str, float], cpus: float, gpus: float) -> int:
    by_cpu = _times(node.get("CPU", 0.0), cpus)
    return min(by_cpu, _times(node.get("GPU", 0.0), gpus)) if gpus else by_cpu


def _times(whole: float, part: float) -> int:
    """How often `part` is in `whole`: five times 0.2 in 1."""
    return int(whole / part + 1e-6)
