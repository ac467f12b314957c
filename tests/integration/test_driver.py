"""The driver holds numbers: what computes is loaded by tasks and actors alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import dump_config
from tests.helpers import uid_of
from tests.integration.runs import small_config

#: What a driver has no business with; each costs tens to hundreds of megabytes.
HEAVY = ("torch", "torchvision", "open_clip", "timm", "faiss", "sklearn", "matplotlib", "ray.train")

#: Runs a command line in a process of its own, and says what was loaded by it.
SCRIPT = f"""
import sys
from pipeline.cli import invoke
status = invoke(sys.argv[1:])
print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules])
sys.exit(status)
"""


def loaded_by(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("loaded:")[2].split()


@pytest.mark.ray
@pytest.mark.slow
def test_the_driver_of_a_whole_run_loads_nothing_that_computes(
    make_shards: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    shards = make_shards(shards=3)
    truth = tmp_path / "truth.csv"
    lines = ["uid,clean,caption_class", *(f"{uid_of(number, '0')},a,{'ab'[number % 2]}" for number in range(24))]
    truth.write_text("\n".join(lines))
    evaluate = {"shards": shards[0], "truth": str(truth), "seeds": 1, "baselines": ["random"], "steps": 2}
    whole = small_config(
        shards,
        tmp_path / "run",
        score={"embeddings": True},
        select={"keep": 0.5, "dedup": {"cosine": 0.99}},
        evaluate=evaluate,
    )
    config.write_text(dump_config(whole))
    assert loaded_by("run", str(config)) == []
    assert loaded_by("status", str(tmp_path / "run")) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_validation_loads_nothing_that_computes_and_is_not_measured_again(
    make_shards: Callable[..., list[str]], tmp_path: Path
) -> None:
    sizes = {"pairs": 10, "leave_out": 4, "halves": 4, "seeds": 2, "steps": 3, "swapped": 0.4, "deletions": 2}
    config = small_config(
        make_shards(shards=3), tmp_path / "run", validation={**sizes, "estimators": ["diff-in", "random"]}
    )
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    assert loaded_by("validate", str(file)) == []
    results = tmp_path / "run" / "validation"
    assert len(json.loads((results / "table.json").read_text())["lines"]) == 2
    measures = pq.read_table(results / "results.parquet")["measure"].to_pylist()
    assert {"deletion", "cleaned"} < set(measures)
    marks = {path: path.stat().st_mtime_ns for path in (results / "seeds").iterdir()}
    assert len(marks) == 2
    more = ("engine.retries=1", "select.keep=0.4", "validation.seeds=3")
    assert loaded_by("validate", str(file), *(word for change in more for word in ("--set", change))) == []
    after = {path: path.stat().st_mtime_ns for path in (results / "seeds").iterdir()}
    assert len(after) == 3
    assert marks.items() <= after.items()


def test_help_loads_no_ray() -> None:
    code = "import sys, pipeline.cli; print([name for name in ('ray', 'torch', 'pyarrow') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=240).strip() == "[]"


def test_what_shows_a_pair_loads_nothing_that_computes() -> None:
    code = f"import sys, pipeline.showing; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=240).strip() == "[]"
