"""README and docs: every command parses, every config loads, every snippet runs, every link and page is there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pytest
import typer
import yaml

from pipeline.cli import app
from pipeline.config import Config, SelectConfig, load_config, parse_config
from pipeline.emit.emit import emit
from pipeline.estimators import markdown_table
from pipeline.influence import UTILITY
from pipeline.reference import PAGES
from pipeline.run import RunFolder
from pipeline.selection.formula import _FUNCTIONS, parse_formula
from pipeline.selection.select import select
from pipeline.store.scores import score_schema
from tests.report.synthetic import make_run

ROOT = Path(__file__).resolve().parent.parent
SITE = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *SITE, *ROOT.glob("infra/*.md")]
#: Programs of others that commands may name without being checked further.
OTHERS = {
    "aws", "bash", "cat", "cd", "curl", "docker", "duckdb", "export", "gcloud", "git", "helm", "kubectl",
    "lint-imports", "mkdocs", "nvidia-smi", "pip", "pre-commit", "sbatch", "scancel", "squeue", "tail", "tar",
    "tensorboard", "watch",
}  # fmt: skip
FENCE = re.compile(r"^( *)```([a-z]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all documents in these languages."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(path.relative_to(ROOT).as_posix(), line, match[2], match[3]))
    return [block for block in found if block.language in languages]


def commands(block: Block) -> Iterator[list[str]]:
    """The simple commands of a bash block as words; of pipes and lists each part."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    for line in text.splitlines():
        for part in re.split(r"\s(?:\||&&|\|\||;)\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def check_command(words: list[str], folder: Path) -> None:
    """Fail unless the command could be run as it stands, as far as that can be known without running it."""
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if "--" in arguments and program == "ray":
        check_command(arguments[arguments.index("--") + 1 :], folder)
    elif program == "diffprune":
        check_diffprune(arguments, folder)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, words
    elif Path(program).name in ("python", "python3") and arguments[:1] == ["-m"]:
        assert arguments[1] == "pytest" or importlib.util.find_spec(arguments[1]), words
        if arguments[1].startswith("jobs."):
            check_job(arguments[2:], folder)
    elif program == "python" and arguments[:1] == ["resharder.py"]:
        pass  # DataComp's own program
    elif program == "ray":
        assert arguments[0] in ("start", "job", "get-auth-token", "up", "down", "dashboard", "status", "list"), words
    else:
        path = ROOT / program
        assert program in OTHERS or path.exists(), f"unknown program: {words}"


def check_diffprune(arguments: list[str], folder: Path) -> None:
    """Parse the arguments as the command line does; overrides must name keys that exist."""
    group: Any = typer.main.get_command(app)
    if arguments[0].startswith("-"):
        assert arguments in (["--help"], ["--version"], ["--install-completion"], ["--show-completion"])
        return
    name, *rest = arguments
    assert name in group.commands or name == "COMMAND", arguments
    if name == "COMMAND" or "--help" in rest:
        return
    context = group.commands[name].make_context(name, list(rest))
    check_overrides(context.params.get("set_") or [], folder)


def check_job(arguments: list[str], folder: Path) -> None:
    assert "--config" in arguments, arguments
    known = {"--config", "--set", "--out"}
    assert {word for word in arguments if word.startswith("--")} <= known, arguments
    check_overrides([value for word, value in pairwise(arguments) if word == "--set"], folder)


def check_overrides(overrides: list[str], folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text("data: {shards: a.tar}\nevaluate: {shards: b.tar}\n")
    load_config(path, overrides)


@pytest.mark.parametrize("block", blocks("bash", "sh", "shell", "console"), ids=str)
def test_commands_parse(block: Block, tmp_path: Path) -> None:
    found = list(commands(block))
    assert found
    for words in found:
        check_command(words, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("diffprune prune my.yaml", r"\['prune', 'my.yaml'\]"),
        ("diffprune run", "Missing parameter: config"),
        ("diffprune run a.yaml --set select.kep=1", "select.kep: expected a known key"),
        ("make prun", r"\['make', 'prun'\]"),
        ("frobnicate", "unknown program"),
        ("ray job submit -- python -m jobs.prune my.yaml", r"\['my.yaml'\]"),
    ],
)
def test_wrong_commands_are_found(wrong: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=why):
        check_command(shlex.split(wrong), tmp_path)


def test_commands_in_the_text_parse(tmp_path: Path) -> None:
    spans = [
        (path.name, span)
        for path in DOCUMENTS
        for span in re.findall(r"`(diffprune [a-z][^`\n]*)`", FENCE.sub("", path.read_text(encoding="utf-8")))
    ]
    assert spans
    group: Any = typer.main.get_command(app)
    for document, span in spans:
        arguments = shlex.split(span)[1:]
        assert arguments[0] in group.commands, (document, span)
        if len(arguments) > 1:
            check_diffprune(arguments, tmp_path)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_configs_load(block: Block) -> None:
    """YAML of README and cookbook are configs; elsewhere those with a section of the config are."""
    for tree in yaml.safe_load_all(block.text):
        if block.document in ("README.md", "docs/cookbook.md") or tree.keys() & Config.model_fields.keys():
            parse_config({"data": {"shards": "a.tar"}} | tree, file=str(block))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an emitted run at `runs/mine`."""
    folder = tmp_path_factory.mktemp("docs")
    made = make_run(folder / "runs", shards=2, samples=20)
    run = RunFolder(str(Path(made.run.root).rename(folder / "runs" / "mine")))
    config = made.config.model_copy(update={"out": run.root, "select": SelectConfig(keep=0.5)})
    select(run, config.select, seed=0)
    emit(run, config, made.inventory)
    return folder


@pytest.mark.parametrize("document", sorted({block.document for block in blocks("python")}))
def test_python_runs(document: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document, one after the other, in one namespace."""
    monkeypatch.chdir(finished)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks("python"):
        if block.document == document:
            code = ast.increment_lineno(ast.parse(block.text), block.line)
            exec(compile(code, document, "exec"), names)
    if document == "docs/reading.md":
        assert len(names["frame"]) == 40
        assert names["lowest"]["utility"].is_monotonic_increasing
        assert len(names["rows"]) == 40
        assert len(names["best"]) == 5
        assert names["share"].sum() == pytest.approx(1)
        assert len(names["keys"]) == len(names["kept"]) == 17
        assert names["sample"]["uid"] in set(names["frame"]["uid"])
        assert names["first"] in set(names["frame"]["uid"])


@pytest.mark.parametrize("block", blocks("sql"), ids=str)
def test_queries_run(block: Block, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    assert duckdb.sql(block.text).fetchall()


def test_generated_pages_are_up_to_date() -> None:
    for name, page in PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"run: python -m pipeline.reference ({name})"


def test_tables_of_estimators_are_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    for line in markdown_table():
        assert line in readme
    concepts = (ROOT / "docs" / "concepts.md").read_text()
    for name, form in UTILITY.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", concepts, re.MULTILINE)
        assert line.endswith(f"| {form.replace('|', chr(92) + '|')} |")


def test_formulas_are_those_of_the_grammar() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    section = page.partition("## Formulas for a selection\n")[2].partition("\n## ")[0]
    examples = re.findall(r"^\| .* \| `([^`]+)` \|$", section, re.MULTILINE)
    assert len(examples) == 7
    for example in examples:
        parse_formula(example, "select.by", {*score_schema(0).names, "zterms", "zterms_std"}, {"source"})
    for name in _FUNCTIONS:
        assert f"`{name}(" in section


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ".mkdocs.yml", "--site-dir"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's advertisement for its successor
    done = subprocess.run(
        [*command, str(tmp_path / "site")], capture_output=True, text=True, timeout=240, cwd=ROOT, env=quiet
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    for page in SITE:
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).exists(), name
