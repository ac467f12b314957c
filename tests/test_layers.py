"""The shape of the code base: imports go downwards, modules are short and say what they know."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/**/*.py")])

LONGEST = 400


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_go_downwards_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_says_what_it_knows(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "expected a sentence that says what the module knows"
    assert docstring.split("\n\n")[0].rstrip().endswith((".", ":", "?")), docstring.splitlines()[0]


def test_hooks_before_a_commit_are_valid_and_name_real_tools() -> None:
    tools = Path(sys.executable).parent
    config = ROOT / ".pre-commit-config.yaml"
    subprocess.run([str(tools / "pre-commit"), "validate-config", str(config)], check=True, timeout=240)
    for hook in yaml.safe_load(config.read_text())["repos"][0]["hooks"]:
        program = hook["entry"].split()[0]
        assert program.startswith(".venv/bin/"), program
        assert (tools / Path(program).name).exists(), program
