"""`diffprune plan`: measured on the shards and the model of the config, printed both ways, and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import invoke
from pipeline.config import dump_config
from pipeline.errors import InputError, StageError
from pipeline.stages import calibration, planning
from tests.engine.prepared_run import outside_ray
from tests.helpers import sample_members, write_shards, write_tar
from tests.integration.runs import small_config
from tests.stages.test_costs import RATES

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "demo.yaml"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SECONDS", 0.05)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "quick")
def test_a_plan_names_every_stage_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path / "in", shards=3, samples=20)
    config = small_config(shards, tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert invoke(["plan", str(file), "--json", "--set", "score.sample=0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in found["stages"]] == [
        "inventory", "train", "directions", "score", "select", "emit"
    ]  # fmt: skip
    assert all(stage["seconds"] >= 0 and stage["memory"] > 0 for stage in found["stages"])
    assert found["volume"] == {
        "shards": 3, "pairs": 60, "exact": True, "bytes": sum(Path(shard).stat().st_size for shard in shards),
        "compressed": False, "cpus": 2, "gpus": 0, "workers": 2, "steps": 6, "checkpoints": 2, "runs": 1,
    }  # fmt: skip
    rates = found["rates"]
    assert all(rates[name] > 0 for name in ("start", "count", "decode", "observe", "directions", "step"))
    inventory, train = found["stages"][:2]
    assert inventory["seconds"] == pytest.approx(rates["start"] + 2 * 20 * rates["count"])  # three shards, two CPUs
    assert train["seconds"] == pytest.approx(rates["start"] + 60 * rates["decode"] + 6 * rates["step"])
    assert rates["checkpoint"] >= 0  # the difference of two measurements
    assert rates["parameters"] > rates["pixels"] > 0
    assert rates["embedding"] % 2 == 0
    assert not Path(config.out).exists()

    planning.show_plan(config)
    printed = capsys.readouterr().out
    assert "60 pairs in 3 shards" in printed
    for stage in found["stages"]:
        assert stage["stage"] in printed


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "quick")
def test_a_plan_of_demo_data_needs_none_and_leaves_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"--set=out={tmp_path / 'run'}", "--set=proxy.model=tiny-vit"]
    assert invoke(["plan", str(DEMO), "--json", *settings]) == 0
    assert json.loads(capsys.readouterr().out)["volume"]["pairs"] == 1197
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("grows", [False, True])
def test_a_plan_is_measured_in_what_fits_and_made_for_what_a_cluster_grows_to(
    grows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(planning, "cluster_address", lambda engine: "head:6379" if grows else None)
    monkeypatch.setattr(
        planning, "_calibrate", lambda config, urls, options, _: measured.append((urls, options)) or RATES
    )
    shards = write_shards(tmp_path / "in", shards=5)
    config = small_config(shards, tmp_path / "run", engine={"workers": 64, "cpus_per_worker": 1})
    _, _, volume = planning.plan(config)
    assert measured == [(shards[:2], {"num_cpus": 1, "num_gpus": 0})]
    assert (volume.workers, volume.cpus) == ((5, 5) if grows else (2, 2))
    assert ("the plan is for the 5 asked for" in capsys.readouterr().err) == grows


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_plan_waits_for_a_machine_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "WAITS", 0.1)
    monkeypatch.setattr(planning, "WAITS_AT_MOST", 1.0)
    with pytest.raises(StageError, match="plan: no machine had room for a process with num_cpus=64 within 1 s"):
        planning._wait_for_room({"num_cpus": 64, "num_gpus": 0})
    assert "no machine has room for a process with num_cpus=64; the cluster is asked" in capsys.readouterr().err


def test_a_plan_of_demo_data_refuses_what_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["plan", str(DEMO), "--set=out=s3://bucket/run"]) == 2
    assert "out: expected a local folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("proxy.checkpoint_at=[10000]", "proxy.checkpoint_at: expected different steps up to the run's"),
        ("select.join=missing.parquet", "select.join"),
        ("target.shards=missing-*.tar", "target.shards"),
    ],
)
def test_a_plan_refuses_what_the_run_would_before_it_measures(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "connect", pytest.fail)
    assert invoke(["plan", str(DEMO), f"--set=out={tmp_path / 'run'}", f"--set={setting}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_calibrated_with_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write_tar(tmp_path / "0.tar", [*sample_members("a", b"no image", "words")])
    outside_ray(monkeypatch)
    config = small_config([url], tmp_path / "run")
    with pytest.raises(InputError, match=r"0\.tar: expected at least 8 readable pairs to calibrate with, found 0"):
        calibration.measure(config, url, 2, 0.01, 0.0)


def test_steps_are_taken_for_as_long_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one pass over the pairs: a small model takes thousands of steps before the time is over."""
    taken: list[int] = []

    class Trainer:
        def __init__(self, model: object, pairs: object, order: Any, settings: Any, device: str) -> None:
            self.order, self.settings, self.step = order, settings, 0

        def advance(self) -> None:
            taken.append(int(self.order[self.step, 0]))
            self.step += 1

    def seconds_of(step: Callable[[int], None], target: int, most: int, seconds: float) -> float:
        for _ in range(10_000):
            step(most)
        return 1.0

    outside_ray(monkeypatch)
    monkeypatch.setattr(calibration, "Trainer", Trainer)
    monkeypatch.setattr(calibration, "seconds_of", seconds_of)
    shards = write_shards(tmp_path / "in", shards=1, samples=20)
    assert calibration.training_step(small_config(shards, tmp_path / "run"), shards[0], 0.01) == 1.0
    assert len(taken) == 10_000


def test_a_plan_loads_nothing_that_computes() -> None:
    code = "import sys, pipeline.stages.planning; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=240).strip() == "False"
