"""`diffprune plan`: measured on the shards and the model of the config, printed both ways, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli import invoke
from pipeline.config import dump_config
from pipeline.errors import InputError
from pipeline.stages import calibration, planning
from tests.helpers import sample_members, write_shards, write_tar
from tests.integration.runs import small_config

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "demo.yaml"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.05)


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
    monkeypatch.setattr(calibration, "device_of_this_task", lambda: "cpu")
    config = small_config([url], tmp_path / "run")
    with pytest.raises(InputError, match=r"0\.tar: expected at least 8 readable pairs to calibrate with, found 0"):
        calibration._measure(config, url, 1, 2, 0.01, 0.0)
