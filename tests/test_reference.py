"""The reference pages cover every config key, file and column, with text for each."""

from __future__ import annotations

import re

from pipeline.config import Config
from pipeline.data.reasons import Reason
from pipeline.reference import configuration_reference, iterate_settings, outputs_reference, section_of
from pipeline.store.scores import score_schema


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """First cell to the other cells, of the table under a heading."""
    part = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def keys(section: type, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        found += keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


def test_every_key_is_listed_once_with_its_meaning() -> None:
    settings = [setting for setting in iterate_settings() if setting.type != "section"]
    assert [setting.key for setting in settings] == keys(Config)
    assert all(setting.meaning and setting.type and setting.default for setting in settings)
    page = configuration_reference()
    for setting in settings:
        assert page.count(f"| `{setting.key}` |") == 1


def test_types_limits_and_defaults_are_told() -> None:
    proxy = rows(configuration_reference(), "`proxy`")
    assert proxy["proxy.lr"][:2] == ["number > 0", "`0.0005`"]
    assert proxy["proxy.subset"][0] == "number > 0 and ≤ 1"
    assert proxy["proxy.beta1"][0] == "number ≥ 0 and < 1"
    assert proxy["proxy.optimizer"][:2] == ["`adamw`, `sgd`", "`adamw`"]
    assert proxy["proxy.steps"][0] == "integer > 0 or null"
    assert rows(configuration_reference(), "`data`")["data.shards"][1] == "required"
    assert rows(configuration_reference(), "`select`")["select.dedup.exact"][:2] == ["true or false", "`false`"]


def test_every_column_and_reason_is_described() -> None:
    page = outputs_reference()
    columns = rows(page, "Columns of `scores/*.parquet`")
    assert list(columns) == score_schema(8).names
    assert all(cells[2] for cells in columns.values())
    assert columns["utility"][:2] == ["float32", "yes"]
    assert columns["uid"][1] == "no"
    reasons = rows(page, "Values of `status`")
    assert list(reasons) == [reason.value for reason in Reason]
    assert all(cells[0] for cells in reasons.values())


def test_files_are_those_of_the_run_folder() -> None:
    files = rows(outputs_reference(), "Files of a run's folder")
    for path in (
        "config.yaml",
        "scores/00000.parquet",
        "checkpoints/manifest.json",
        "report/index.html",
        "selections/NAME",
        "checkpoints/run-000/settings.json",
        "directions/00000.safetensors",
        "pruned/selection.json",
        "pruned/shards/sizes.json",
        "evaluation/results.json",
        "validation/table.json",
        "tensorboard/",
    ):
        assert files[path][0]
