"""Defaults that fit the machines found."""

from __future__ import annotations

import pytest

from pipeline.config import EngineConfig
from pipeline.engine.resources import decode_threads, plan_workers


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus"),
    [
        ([{"CPU": 2}], 2, 1, 0),
        ([{"CPU": 64}], 8, 8, 0),
        ([{"CPU": 64}, {"CPU": 16}], 40, 2, 0),
        ([{"CPU": 96, "GPU": 8}], 8, 12, 1),
        ([{"CPU": 96, "GPU": 8}, {"CPU": 16}], 8, 12, 1),
        ([{"CPU": 4, "GPU": 8}], 8, 0.5, 1),
        ([{"CPU": 2, "GPU": 3}], 3, 0.6666, 1),
        ([{"CPU": 128, "GPU": 8}, {"CPU": 4, "GPU": 1}], 9, 4, 1),
        ([{"CPU": 0.0}, {"CPU": 64}], 8, 8, 0),
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


@pytest.mark.parametrize(("part", "times"), [(0.5, 2), (0.2, 5), (0.1, 10), (0.3, 3), (1 / 3, 3), (0.7, 1)])
def test_as_many_workers_share_a_gpu_as_its_parts_allow(part: float, times: int) -> None:
    assert plan_workers(EngineConfig(gpus_per_worker=part), [{"CPU": 40, "GPU": 2}]).workers == 2 * times


def test_what_fits_the_machines_that_are_there_is_not_what_is_asked_for() -> None:
    assert plan_workers(EngineConfig(workers=64), [{"CPU": 16, "GPU": 2}], may_grow=True).fitting == 2
    assert plan_workers(EngineConfig(workers=64, gpus_per_worker=1), [{"CPU": 16}]).fitting == 0


def test_threads_decode_on_all_of_a_machine_though_a_smaller_one_decides_what_is_reserved() -> None:
    assigned = {"CPU": 4.0, "GPU": 1.0}
    assert decode_threads(EngineConfig(), assigned, {"CPU": 128, "GPU": 8}) == 16
    assert decode_threads(EngineConfig(), assigned, {"CPU": 4, "GPU": 1}) == 4
    assert decode_threads(EngineConfig(), {"CPU": 0.5, "GPU": 1.0}, {"CPU": 4, "GPU": 8}) == 1
    assert decode_threads(EngineConfig(), {"CPU": 2.0}, {"CPU": 64}) == 2
    assert decode_threads(EngineConfig(cpus_per_worker=4), assigned, {"CPU": 128, "GPU": 8}) == 4
    assert decode_threads(EngineConfig(decode_threads=3), assigned, {"CPU": 128, "GPU": 8}) == 3


def test_a_cluster_that_may_grow_is_asked_for_as_many_again() -> None:
    nodes: list[dict[str, float]] = [{"CPU": 96, "GPU": 8}]
    assert plan_workers(EngineConfig(), nodes, may_grow=True).workers == 16
    assert plan_workers(EngineConfig(), [], may_grow=True).workers == 2
    assert plan_workers(EngineConfig(workers=3), nodes, may_grow=True).workers == 3
