"""The entry points of submitted jobs: what they hand to the command line, and errors of one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jobs import entry


def handed_over(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> list[str]:
    calls: list[list[str]] = []

    def invoke(given: list[str]) -> int:
        calls.append(given)
        return 0

    monkeypatch.setattr(entry, "invoke", invoke)
    monkeypatch.setattr(entry, "leave", sys.exit)
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as ended:
        entry.main(command, None)
    assert ended.value.code == 0
    (call,) = calls
    return call


def test_arguments_reach_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--config", "my.yaml", "--set", "a.b=1", "--set", "c=2", "--out", "runs/mine"]
    expected = ["my.yaml", "--set", "a.b=1", "--set", "c=2", "--out", "runs/mine"]
    for command in ("run", "train", "score", "select", "evaluate"):
        assert handed_over(monkeypatch, command, *given) == [command, *expected]


@pytest.mark.parametrize("command", ["run", "score"])
def test_shards_that_were_set_aside_are_taken_up(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    call = handed_over(monkeypatch, command, "--config", "my.yaml", "--retry-failed")
    assert call == [command, "my.yaml", "--retry-failed"]


@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        ("score", ["--retry-failed"], "error: the following arguments are required: --config"),
        ("select", ["--config", "my.yaml", "--retry-failed"], "error: unrecognized arguments: --retry-failed"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, arguments: list[str], line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as ended:
        entry.main(command, None)
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert len(err.splitlines()) == 1


def test_the_help_is_found_as_the_error_says() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.score"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr.endswith("(see `python -m jobs.score --help`)\n")
