"""The command line: what its commands print, the statuses it exits with, and that it stays quick to start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import typer
from botocore.exceptions import NoCredentialsError
from ray.exceptions import RayTaskError

from pipeline.cli import app, invoke
from pipeline.config import Config, load_config
from pipeline.estimators import ESTIMATORS
from pipeline.influence import Settings, prepare_run
from pipeline.literals import EstimatorName
from tests.helpers import image_bytes, sample_members, uid_of, write_tar
from tests.influence.test_diff_in import N, make_case
from tests.report.synthetic import Made, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("made"), shards=2, samples=20)


def commands() -> list[str]:
    return sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["inspekt"], "error: No such command 'inspekt'. Did you mean 'inspect'? (see `diffprune --help`)"),
        (["run"], "error: Missing argument 'CONFIG'. (see `diffprune run --help`)"),
        (["run", "a", "b"], "error: Got unexpected extra argument"),
        (["status", "--all"], "error: No such option: --all"),
        (["inspect", "a.tar", "--examples", "-1"], "error: Invalid value for '--examples'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    capfd: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert invoke(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(line)


def test_exit_statuses_are_in_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--help"]) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert "Exit status: 0 when everything asked for is complete, 2 for" in page
    assert "130 when stopped at once by Ctrl-C, 1 for anything else." in page


def test_help_groups_all_commands_and_each_has_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--help"]) == 0
    page = capfd.readouterr().out
    for panel in ("Before a run", "The job", "Its stages", "During and after a run", "Trust"):
        assert panel in page
    for name in commands():
        assert f" {name} " in page
        assert invoke([name, "--help"]) == 0
        text = " ".join(capfd.readouterr().out.split())
        assert f"diffprune {name}" in text.split("Example: ")[1]


def test_without_arguments_the_help_is_shown_and_the_status_is_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke([]) == 2
    out, err = capfd.readouterr()
    assert "Usage: diffprune" in out + err
    assert "error:" not in out + err


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    import importlib.metadata

    assert invoke(["--version"]) == 0
    assert capfd.readouterr().out == f"diffprune {importlib.metadata.version('diffprune')}\n"


def test_completion_knows_the_commands() -> None:
    asked = {"_DIFFPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "diffprune in", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli"], env={**os.environ, **asked}, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split() == ["init", "inspect", "inventory"]


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, pipeline; from pipeline.cli import invoke; assert invoke(['--help']) == 0; "
        "heavy = {'torch', 'ray', 'pyarrow', 'open_clip'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=240)


def test_estimators_are_all_listed_with_their_real_costs(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(["estimators"]) == 0
    page = capfd.readouterr().out
    assert [facts.name for facts in ESTIMATORS] == list(get_args(EstimatorName))
    for facts in ESTIMATORS:
        line = next(line for line in page.splitlines() if line.startswith(f"{facts.name} "))
        assert facts.passes in line


@pytest.mark.parametrize("facts", ESTIMATORS, ids=lambda facts: facts.name)
def test_costs_are_those_of_the_plans(facts) -> None:
    settings = Settings(estimator=facts.name)
    model, checkpoints, batches, _ = make_case(settings)
    plan = prepare_run(model, checkpoints, batches, settings, dataset_size=N)[0]
    tangents = {(probe.at, vector) for probe in plan.probes for vector in probe.along}
    alone = {probe.at for probe in plan.probes if probe.of != "random"} - {at for at, _ in tangents}
    assert (len(tangents), len(alone)) == (facts.tangents, facts.forwards)


@pytest.mark.parametrize(
    "stage", ["inventory", "train", "directions", "score", "select", "emit", "report", "evaluate", "validate"]
)
def test_stages_get_the_config_with_overrides(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages import runner

    calls: list[tuple[str, Config]] = []
    monkeypatch.setattr(runner, "run_stage", lambda name, config, **_: calls.append((name, config)))
    (tmp_path / "my.yaml").write_text("data: {shards: a.tar}\n")
    assert invoke([stage, str(tmp_path / "my.yaml"), "--set", "select.keep=0.25", "--out", "elsewhere"]) == 0
    ((name, config),) = calls
    assert (name, config.select.keep, config.out) == (stage, 0.25, "elsewhere")


def test_flags_reach_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages import looking, runner

    calls: list[str] = []
    monkeypatch.setattr(runner, "run_all", lambda config, retry_failed: calls.append(f"run {retry_failed}"))
    monkeypatch.setattr(runner, "run_stage", lambda name, config, retry_failed: calls.append(f"{name} {retry_failed}"))
    monkeypatch.setattr(looking, "show_plan", lambda config: calls.append(f"plan {config.select.name}"))
    path = tmp_path / "my.yaml"
    path.write_text("data: {shards: a.tar}\n")
    for arguments in (["run", "--retry-failed"], ["run"], ["score", "--retry-failed"], ["select", "--dry-run"]):
        assert invoke([arguments[0], str(path), *arguments[1:]]) == 0
    assert calls == ["run True", "run False", "score True", "plan default"]


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipeline.stages import runner

    def interrupt(config: Config, retry_failed: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_all", interrupt)
    (tmp_path / "my.yaml").write_text("data: {shards: a.tar}\n")
    assert invoke(["run", str(tmp_path / "my.yaml")]) == 130
    assert "the same command goes on from here" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(13, "Permission denied", "/data/run"),
            "storage: PermissionError: [Errno 13] Permission denied: '/data/run'",
        ),
        (NoCredentialsError(), "storage: NoCredentialsError: Unable to locate credentials"),
        (
            RayTaskError("write", "the traceback", NoCredentialsError()),
            "storage: NoCredentialsError: Unable to locate credentials",
        ),
    ],
)
def test_storage_that_cannot_be_used_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipeline.engine import status

    def fail(run: str) -> None:
        raise error

    monkeypatch.setattr(status, "print_status", fail)
    assert invoke(["status", "s3://bucket/run"]) == 1
    assert capfd.readouterr().err == f"error: {line}\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.engine import status

    def fail(run: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(status, "print_status", fail)
    with pytest.raises(ZeroDivisionError):
        invoke(["status", "runs/mine"])


def test_inspect_counts_and_shows_pairs(capfd: pytest.CaptureFixture[str], tiny_shards: list[str]) -> None:
    assert invoke(["inspect", *tiny_shards, "--examples", "1"]) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert "shards 2, " in page
    assert "pairs 16 " in page
    assert "No problems found." in page
    assert "a red boat" in page


def test_inspect_fails_when_no_pair_can_be_used(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", sample_members("0", image_bytes(), None, {"text": "a dog"}))
    assert invoke(["inspect", url]) == 1
    assert "no pair can be used: no-caption 1" in capfd.readouterr().err
    assert invoke(["inspect", url, "--caption", "json:text"]) == 0
    assert invoke(["inspect", url, "--caption", "json:"]) == 2
    assert invoke(["inspect", str(tmp_path / "none" / "*.tar")]) == 2


def test_init_writes_a_config_once(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, make_shards: Callable[..., list[str]]
) -> None:
    urls = make_shards(shards=2, samples=20)
    path = tmp_path / "my.yaml"
    assert invoke(["init", *urls, "--to", str(path), "--out", "runs/mine"]) == 0
    assert f"diffprune run {path}" in capfd.readouterr().out.replace("\n", "")
    config = load_config(path)
    assert config.out == "runs/mine"
    assert invoke(["init", *urls, "--to", str(path)]) == 2
    assert "there is a file of this name already" in capfd.readouterr().err


def test_show_tells_a_pair_and_writes_its_image(capfd: pytest.CaptureFixture[str], tmp_path: Path, made: Made) -> None:
    uid = uid_of(12)
    assert invoke(["show", made.run.root, uid[:10], "--image", str(tmp_path / "pair.jpg"), "--neighbours", "2"]) == 0
    page = capfd.readouterr().out
    assert uid in page
    assert "Terms" in page
    assert "Nearest images" in page
    assert (tmp_path / "pair.jpg").read_bytes() == image_bytes((48, 48), seed=12)
    assert invoke(["show", made.run.root, "f" * 32]) == 1
    assert "no pair of" in capfd.readouterr().err
    assert invoke(["show", str(tmp_path / "nothing"), uid]) == 1
    assert "expected a run's folder" in capfd.readouterr().err


def test_demo_writes_its_shards(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert invoke(["demo", str(tmp_path / "demo")]) == 0
    assert "training shards:" in capfd.readouterr().out
    assert len(list((tmp_path / "demo" / "train").glob("*.tar"))) == 6


def test_compare_prints_the_overlap(capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny_shards: list[str]) -> None:
    from pipeline.config import SelectConfig
    from pipeline.selection.select import select
    from tests.emit import made_run

    made = made_run.make_run(tmp_path / "run", tiny_shards, keep=0.5)
    select(made.run, SelectConfig(name="quarter", keep=4), seed=0)
    assert invoke(["compare", made.run.root, "default", "quarter"]) == 0
    page = capfd.readouterr().out
    lines = [line.split() for line in page.splitlines()]
    assert ["all", "4", "4", "0"] in [line[:4] for line in lines]
    assert invoke(["compare", made.run.root, "default", "other"]) == 1


def test_verify_lists_what_is_off(capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny_shards: list[str]) -> None:
    from tests.emit import made_run

    made = made_run.make_run(tmp_path / "run", tiny_shards)
    Path(made.run.score_file(0)).write_bytes(b"broken")
    assert invoke(["verify", made.run.root]) == 1
    out, err = capfd.readouterr()
    assert "00000.parquet" in out
    assert "found in" in err


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["frobnicate"], 2)])
def test_a_command_ends_with_its_status_whatever_the_interpreter_would_do(arguments: list[str], status: int) -> None:
    code = "import atexit, os, pipeline.cli; atexit.register(os.abort); pipeline.cli.main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == status
    assert (done.stdout or done.stderr).endswith("\n")
