"""A plan's arithmetic, stage by stage, from rates and volumes that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.stages.costs import Rates, StageCost, Volume, costs

RATES = Rates(
    start=10.0, count=0.001, decode=0.002, checkpoint=0.1, last=0.11, observe=0.01, directions=40.0, step=0.5,
    parameters=1_000_000, directed=2_000_000, random=0, pixels=3000, tokens=16, embedding=64,
)  # fmt: skip
VOLUME = Volume(
    shards=10, pairs=10_000, exact=True, bytes=10**9, compressed=False, cpus=2, gpus=0, workers=2, steps=100,
    checkpoints=4, runs=1,
)  # fmt: skip


def config_of(**sections: dict[str, Any]) -> Config:
    reference = {"pairs": 100, "gradient_pairs": 300}
    return parse_config({"data": {"shards": "x"}, "target": {"pairs": 100}, "reference": reference, **sections})


def planned(volume: Volume = VOLUME, rates: Rates = RATES, **sections: dict[str, Any]) -> dict[str, StageCost]:
    return {cost.stage: cost for cost in costs(config_of(**sections), rates, volume)}


def test_stages_come_in_order_and_take_what_the_rates_say() -> None:
    found = planned()
    assert list(found) == ["inventory", "train", "directions", "score", "select", "emit"]
    assert found["inventory"].seconds == pytest.approx(10 + 5 * 1000 * 0.001)
    assert found["train"].seconds == pytest.approx(10 + 10_000 * 0.002 + 100 * 0.5)
    assert found["directions"].seconds == pytest.approx(10 + 500 * 0.002 + 2 * 10)  # four checkpoints on two CPUs
    assert found["directions"].storage == 4 * 2_000_000 * 4 + 500 * (3000 + 128 + 16)
    assert found["directions"].memory == (800 << 20) + 4 * (6 * 1_000_000 + 2_000_000)
    assert found["score"].seconds == pytest.approx(10 + 100 * 0.41 + 5 * 1000 * (0.41 + 0.002))
    assert found["train"].storage == 4_000_000 * 3 * 4 + 10_000 * (3000 + 64 + 24)
    assert found["score"].storage == 90 * 10_000
    assert all(cost.gpu_hours == 0 for cost in found.values())


def test_what_the_last_pass_gives_costs_no_pass_of_its_own() -> None:
    found = planned(rates=replace(RATES, last=0.1))
    assert found["score"].seconds == pytest.approx(10 + 100 * 0.41 + 5 * 1000 * (0.4 + 0.002))


def test_shards_are_the_grain_of_the_work() -> None:
    three, four = (planned(replace(VOLUME, shards=n))["score"].seconds for n in (3, 4))
    assert three - 51 == pytest.approx((four - 51) * 4 / 3)


def test_a_sample_costs_its_share_of_the_terms_and_stores_embeddings() -> None:
    full, part = planned(), planned(score={"sample": 0.05})
    assert part["score"].seconds == pytest.approx(30 + 41 + 5000 * (0.05 * 0.4 + 0.01 + 0.002))
    assert part["score"].storage - full["score"].storage == (90 + 128) * 10_000
    assert part["train"] == full["train"]


def test_a_gpu_hides_decoding_and_its_hours_are_counted() -> None:
    found = planned(replace(VOLUME, gpus=2, workers=2), replace(RATES, decode=1.0))
    assert found["score"].seconds == pytest.approx(10 + 41 + 5000 * 1.0)
    assert found["score"].gpu_hours == pytest.approx(2 * found["score"].seconds / 3600)
    assert found["inventory"].gpu_hours == 0


def test_runs_share_the_machine_and_given_checkpoints_need_no_training() -> None:
    one, three = planned(), planned(replace(VOLUME, runs=3))
    assert three["train"].seconds - one["train"].seconds == pytest.approx(50)
    assert three["directions"].seconds - one["directions"].seconds == pytest.approx(4 * 10)
    given = planned(proxy={"checkpoints": ["a.pt"]})
    assert given["train"].seconds == 0
    replayed = planned(score={"estimator": "unrolled", "replay": "exact"})
    assert replayed["directions"].seconds > one["directions"].seconds
    assert planned(score={"estimator": "random"})["score"].seconds < one["score"].seconds / 3


def test_pairs_drawn_from_compressed_tars_cost_the_way_to_them() -> None:
    plain, walked = planned()["directions"], planned(replace(VOLUME, compressed=True))["directions"]
    assert walked.seconds - plain.seconds == pytest.approx(2 * 0.001 * 10_000)
    few = replace(VOLUME, compressed=True, shards=1000)  # half a pair from each of them
    assert planned(few)["directions"].seconds - plain.seconds == pytest.approx(2 * 0.001 * 5000)


def test_random_vectors_take_memory_where_they_are_drawn() -> None:
    without, found = planned(), planned(rates=replace(RATES, random=10**9))
    for stage in ("directions", "score"):
        assert found[stage].memory - without[stage].memory == 10**9
        assert found[stage].storage == without[stage].storage


@pytest.mark.parametrize(("keep", "kept"), [(0.5, 5000), (2000, 2000), ({"threshold": 0.1}, 10_000)])
def test_tars_take_the_kept_share_of_the_input(keep: Any, kept: int) -> None:
    found = planned(select={"keep": keep}, emit={"materialize": True})
    assert found["emit"].storage == kept * 10**5 + 16 * kept
    assert found["select"].storage == 60 * kept
    assert planned(select={"keep": keep})["emit"].storage == 16 * kept
