"""Defaults that fit the machines found."""

from __future__ import annotations

import pytest

from pipeline.config import EngineConfig
from pipeline.engine.resources import plan_workers


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus"),
    [
        ([{"CPU": 2}], 2, 1, 0),
        ([{"CPU": 64}], 8, 8, 0),
        ([{"CPU": 64}, {"CPU": 16}], 40, 2, 0),
        ([{"CPU": 96, "GPU": 8}], 8, 12, 1),
        ([{"CPU": 96, "GPU": 8}, {"CPU": 16}], 8, 12, 1),
        ([{"CPU": 4, "GPU": 8}], 4, 1, 1),
        ([{"CPU": 0.0}], 1, 1, 0),
        ([], 1, 1, 0),
    ],
)
def test_defaults(nodes: list[dict[str, float]], workers: int, cpus: float, gpus: float) -> None:
    plan = plan_workers(EngineConfig(), nodes)
    assert (plan.workers, plan.cpus, plan.gpus) == (workers, cpus, gpus)


def test_what_the_config_says_goes() -> None:
    config = EngineConfig(workers=3, cpus_per_worker=4, gpus_per_worker=0.5, memory_per_worker=1 << 30)
    plan = plan_workers(config, [{"CPU": 8, "GPU": 1}])
    assert plan.workers == 3
    assert plan.options() == {"num_cpus": 4, "num_gpus": 0.5, "memory": 1 << 30}


def test_two_workers_share_a_gpu_when_each_takes_half() -> None:
    assert plan_workers(EngineConfig(gpus_per_worker=0.5), [{"CPU": 8, "GPU": 2}]).workers == 4


def test_a_cluster_that_may_grow_is_asked_for_as_many_again() -> None:
    nodes: list[dict[str, float]] = [{"CPU": 96, "GPU": 8}]
    assert plan_workers(EngineConfig(), nodes, may_grow=True).workers == 16
    assert plan_workers(EngineConfig(), [], may_grow=True).workers == 2
    assert plan_workers(EngineConfig(workers=3), nodes, may_grow=True).workers == 3
