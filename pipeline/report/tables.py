"""The tables of the page: rejections, profiles of kept and pruned pairs, settings, timings, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel

from pipeline.config import Config
from pipeline.errors import StageError
from pipeline.reference import meaning, section_of
from pipeline.report.collect import Comparison, Findings
from pipeline.report.groups import wilson
from pipeline.report.rows import Bools, Floats
from pipeline.run import RunFolder
from pipeline.selection.summary import read_summary
from pipeline.text import count, duration, number, percent, plain, plus_minus, power_of_ten, without_secrets


@dataclass(frozen=True)
class Table:
    """Cells of text under heads; columns in `numeric` are set right, `breakable` text may break within words."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: frozenset[int] = frozenset()
    breakable: bool = False


def rejection_table(found: Findings) -> Table | None:
    """How many pairs were rejected for what; None when no pair was."""
    if not found.rejected:
        return None
    rows = [(reason, count(pairs), percent(pairs / found.total, 2)) for reason, pairs in found.rejected.most_common()]
    return Table("Rejected pairs by reason", ("reason", "pairs", "of all pairs"), rows, frozenset({1, 2}))


def pruned_table(run: RunFolder, selection: str) -> Table | None:
    """How many scored pairs a selection left out for what; None where it did not record that."""
    try:
        pruned = read_summary(run, selection).pruned
    except StageError:
        return None
    total = sum(pruned.values())
    rows = [(reason, count(pairs), percent(pairs / total, 1)) for reason, pairs in pruned.items() if pairs]
    rows.sort(key=lambda row: -pruned[row[0]])
    return (
        Table("Pruned pairs by reason", ("reason", "pairs", "of the pruned"), rows, frozenset({1, 2})) if rows else None
    )


def profile_table(found: Findings) -> Table | None:
    """Medians and quartiles of kept and pruned pairs, from the drawn sample; None unless there are both."""
    sample = found.sample
    kept = sample.kept
    if not kept.any() or kept.all():
        return None
    typical = float(np.median(np.abs(sample["utility"])))
    exponent = math.floor(math.log10(typical)) if typical > 0 else 0
    exponent = exponent if exponent < -2 or exponent > 3 else 0
    rows = []
    for name, label in (
        ("utility", f"utility, \u00d7\u00a0{power_of_ten(exponent)}" if exponent else "utility"),
        ("similarity", "similarity, cosine"), ("loss", "loss, nats"),
        ("caption_length", "caption length, characters"), ("width", "image width, pixels"),
        ("height", "image height, pixels"),
    ):  # fmt: skip
        if np.isfinite(sample[name]).any():
            values = sample[name] / 10.0**exponent if name == "utility" else sample[name]
            rows.append((label, _quartiles(values, kept), _quartiles(values, ~kept)))
    title = f"Median and quartiles of kept and pruned pairs, from {count(len(sample))} drawn at random"
    return Table(title, ("", "kept", "pruned"), rows)


def _quartiles(values: Floats, mask: Bools) -> str:
    chosen = values[mask & np.isfinite(values)]
    if not len(chosen):
        return number(None)
    low, middle, high = np.quantile(chosen, [0.25, 0.5, 0.75])
    write = count if float(max(abs(low), abs(high))) >= 10 else number
    return f"{write(float(middle))} ({write(float(low))}\u00a0to\u00a0{write(float(high))})"


#: Names in `summary.json` that say less than the config's.
_RANKED_BY = {"select": "select.by"}


def quality_table(quality: Mapping[str, Any]) -> Table | None:
    """How well values find the pairs known to be wrong: one row per value, with intervals where sizes are known."""
    by = quality.get("by")
    entries = {name: value for name, value in by.items() if "auroc" in value} if isinstance(by, Mapping) else {}
    if not entries:
        return None
    rows = [
        (_RANKED_BY.get(name, plain(name)), _auroc(value), number(value.get("average_precision"), 3), _precision(value),
         percent(value.get("base_rate")))
        for name, value in entries.items()
    ]  # fmt: skip
    heads = ("ranked by", "AUROC", "average precision", "wrong among the pairs ranked lowest", "wrong among all")
    return Table("How well low values point at the pairs known to be wrong (95\u202f% intervals)", heads, rows)


def _auroc(value: Mapping[str, Any]) -> str:
    area, pairs, rate = value["auroc"], value.get("pairs"), value.get("base_rate")
    if area is None or not pairs or not rate:
        return number(area)
    wrong, right = rate * pairs, (1 - rate) * pairs
    # Hanley & McNeil 1982, the standard error of an area under a ROC curve
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (wrong - 1) * (q1 - area**2) + (right - 1) * (q2 - area**2)
    return plus_minus(area, 1.96 * math.sqrt(max(variance, 0) / max(wrong * right, 1)))


def _precision(value: Mapping[str, Any]) -> str:
    share, suspects = value.get("precision"), value.get("suspects")
    if share is None or not suspects:
        return percent(share)
    low, high = wilson(round(share * suspects), int(suspects))
    return f"{percent(share)} ({percent(low)}\u00a0to\u00a0{percent(high)}) of\u00a0{count(suspects)}"


def comparison_table(comparison: Comparison, selection: str) -> Table:
    """Pairs and mean values by which of two selections keeps them."""
    names = {"both": "kept by both", "only this": f"only {selection}", "only that": f"only {comparison.name}",
             "neither": "kept by neither"}  # fmt: skip
    rows = []
    for cell, label in names.items():
        pairs, known, utility, similarity = comparison.cells[cell]
        rows.append((label, count(pairs), number(utility / pairs if pairs else None),
                     number(similarity / known if known else None)))  # fmt: skip
    heads = ("", "pairs", "mean utility", "mean similarity")
    return Table("Pairs by which selection keeps them", heads, rows, frozenset({1, 2, 3}))


def settings(config: Config) -> Iterator[tuple[str, str, bool, str]]:
    """Every setting: dotted key, value, whether it differs from the default, what it means."""
    yield from _settings(config, "")


def _settings(section: BaseModel, prefix: str) -> Iterator[tuple[str, str, bool, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(value, BaseModel) and section_of(field.annotation) is not None:
            yield from _settings(value, f"{prefix}{name}.")
            continue
        plain_value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        text = json.dumps(plain_value, ensure_ascii=False) if not isinstance(plain_value, str) else plain_value
        yield f"{prefix}{name}", plain(without_secrets(text), 300), value != default, meaning(field)


def settings_tables(config: Config) -> tuple[Table, Table]:
    """The settings that differ from their defaults, and all of them with their meaning."""
    every = list(settings(config))
    changed = [(key, value) for key, value, differs, _ in every if differs]
    return (
        Table("Settings that differ from the defaults", ("key", "value"), changed, breakable=True),
        Table(
            "All settings",
            ("key", "value", "meaning"),
            [(key, value, text) for key, value, _, text in every],
            breakable=True,
        ),
    )


def timing_table(timings: Mapping[str, Any]) -> Table | None:
    """Seconds per stage, from `summary.json`."""
    rows = []
    for name, seconds in timings.items():
        if isinstance(seconds, int | float):
            rows.append((plain(name.replace("_", " ")), duration(float(seconds))))
    return Table("Time per stage", ("stage", "time"), rows, frozenset({1})) if rows else None


def throughput_table(scores: Mapping[str, Any]) -> Table | None:
    """How fast pairs were scored, and where the workers' time went; from `summary.json`."""
    rows = []
    rate = scores.get("pairs_per_worker_second")
    if isinstance(rate, int | float):
        rows.append(("pairs per worker and second of scoring", number(float(rate))))
    for phase, seconds in (scores.get("worker_seconds") or {}).items():
        if isinstance(seconds, int | float):
            rows.append((f"workers' time: {plain(phase)}", duration(float(seconds))))
    return Table("Scoring", ("what", "value"), rows, frozenset({1})) if rows else None


def flat_table(title: str, tree: Mapping[str, Any]) -> Table | None:
    """A nested mapping of plain values as dotted names and values."""
    rows = list(_flat(tree, ""))
    return Table(title, ("what", "value"), rows, breakable=True) if rows else None


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield (
                plain(f"{prefix}{name}"),
                number(value, 4) if isinstance(value, float) else plain(without_secrets(str(value)), 200),
            )
