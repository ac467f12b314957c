"""The report page of a run: one HTML file that brings its style, script, plots and pictures with it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape
from scipy.special import stdtr

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo, read_inventory
from pipeline.errors import StageError
from pipeline.estimators import facts_of
from pipeline.report import evaluation, predicted, sections, tables
from pipeline.report.cards import galleries, make_cards
from pipeline.report.clusters import find_clusters
from pipeline.report.collect import Comparison, Findings, collect
from pipeline.report.contents import fetch
from pipeline.report.figures import agreement_figures, density_figure, utility_figure
from pipeline.report.recorded import checkpoint_names, optional_json, provenance
from pipeline.report.rows import selections
from pipeline.run import RunFolder
from pipeline.store import storage
from pipeline.text import count, number, percent, plain, plural

#: Units of the values that utility is plotted against.
UNITS = {"similarity": "cosine", "loss": "nats"}


def write_report(run: RunFolder, config: Config, *, selection: str = "default") -> str:
    """Write `report/index.html` for one selection of a run and return its URL.

    Reads the inventory, the committed scores and the keep lists; the checkpoint manifest, `summary.json`,
    `evaluation/results.json` and other selections where they are there; and the few input shards with pairs of
    the galleries. Memory does not grow with the number of pairs. Raises `StageError` when a stage is missing.
    """
    if not storage.exists(run.inventory):
        raise StageError(f"{run.root}: no inventory: run `diffprune inventory CONFIG` first")
    names = selections(run)
    if selection not in names:
        raise StageError(f"{run.root}: selection {selection!r} is not there: run `diffprune select CONFIG` first")
    inventory = read_inventory(run.inventory)
    ordered = [selection, *(name for name in names if name != selection)]
    found = collect(run, inventory, ordered, config.report.gallery, config.seed)
    storage.write_bytes(run.report, render(run, config, inventory, found).encode())
    return run.report


def render(run: RunFolder, config: Config, inventory: list[ShardInfo], found: Findings) -> str:
    """The page's HTML. All text from data goes through Jinja2's escaping."""
    summary = optional_json(run.summary)
    manifest = optional_json(run.checkpoint_manifest)
    number_of_terms = found.sample.terms.shape[1] if found.scored else 0
    names = checkpoint_names(manifest, number_of_terms)
    shown = {(pair.shard, pair.index) for pairs in found.galleries.values() for pair in pairs}
    captions = sections.frequent_captions(found.captions)
    clusters = find_clusters(run, found.shards, found.selection, shown, config.seed)
    examples = [*captions, *(clusters.groups if clusters else ())]
    contents = fetch({*shown, *(group.example for group in examples)}, inventory, config.data, run.places)
    cards = make_cards(found, contents, names, config.data, clusters.of_pair if clusters else {})
    results = evaluation.read_results(run)
    groups = [
        section
        for section in (
            sections.source_section(found.sources, config.data.source),
            sections.caption_section(found.captions, captions, contents),
            sections.cluster_section(clusters, contents) if clusters else None,
        )
        if section
    ]
    changed, every = tables.settings_tables(config)
    script = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    context: dict[str, Any] = {
        "name": plain(storage.basename(run.root.rstrip("/")) or run.root, 80),
        "selection": found.selection,
        "version": version("diffprune"),
        "style": Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "lead": lead(found, config),
        "numbers": _numbers(found),
        "bar": stacked_bar([(found.kept, "kept"), (found.pruned, "pruned"), (found.total - found.scored, "rejected")]),
        "notes": _notes(found, summary.get("quality") or {}, _number_of_runs(manifest)),
        "profile": tables.profile_table(found) if found.scored else None,
        "quality": tables.quality_table(summary.get("quality") or {}),
        "evaluation": evaluation.evaluation_section(results, config) if results else None,
        "scores": _scores(found),
        "predicted": predicted.predicted_section(run) if config.score.sample < 1 else None,
        "galleries": [each for each in galleries(config.score.estimator) if found.galleries.get(each.id)],
        "for_a_target": facts_of(config.score.estimator).for_a_target,
        "cards": cards,
        "reasons": sorted({card.reason for card in cards}),
        "card_sources": sorted({card.source for card in cards if card.source}),
        "card_clusters": sorted({card.cluster for card in cards if card.cluster}, key=int),
        "checkpoints": _checkpoints(found, names, manifest) if number_of_terms > 1 else None,
        "group_sections": groups,
        "pruned": tables.pruned_table(run, found.selection),
        "rejections": tables.rejection_table(found),
        "missing_shards": found.missing_shards,
        "comparisons": [_comparison(comparison, found.selection) for comparison in found.comparisons],
        "provenance": [table for table in _provenance(run, summary) if table],
        "changed": changed,
        "settings": every,
    }
    context["sections"] = _contents(context)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(context)


def lead(found: Findings, config: Config) -> str:
    """The one sentence that says what the headline numbers mean."""
    rejected = found.total - found.scored
    text = f"Of {plural(found.total, 'pair')}, {count(found.kept)} are kept for training"
    by = config.select.by
    if by != "utility":
        text += f", chosen by {by}, with utility from the estimator"
    elif found.cut.sharp:
        text += f": those with a utility of {number(found.cut.lowest_kept)} or more, by the estimator"
    else:
        text += ", chosen by the estimator"
    text += f" {config.score.estimator}. "
    if found.pruned and by != "utility":
        text += f"{count(found.pruned)} that rank lower are pruned. "
    elif found.pruned and (not facts_of(config.score.estimator).for_a_target or not found.cut.sharp):
        text += f"{count(found.pruned)} are pruned. "
    elif found.pruned:
        text += f"{count(found.pruned)} are pruned because others are expected to help the target more. "
    if rejected:
        text += f"{count(rejected)} could not be scored and are left out."
    return text.strip()


def stacked_bar(parts: list[tuple[int, str]]) -> Markup:
    """A bar divided in proportion to the counts of `parts`, which are (count, colour class)."""
    total = sum(amount for amount, _ in parts) or 1
    position, boxes = 0.0, []
    for amount, css in parts:
        width = 1000 * amount / total
        boxes.append(f'<rect x="{position:.2f}" width="{max(width - 1.5, 0):.2f}" height="12" class="{css}"/>')
        position += width
    label = ", ".join(f"{percent(amount / total)} {css.replace('-', ' ')}" for amount, css in parts)
    return Markup(
        f'<svg class="bar" viewBox="0 0 1000 12" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{''.join(boxes)}</svg>"
    )


def _numbers(found: Findings) -> list[tuple[str, str, str, str]]:
    total = max(found.total, 1)
    rejected = found.total - found.scored
    return [
        ("pairs in", count(found.total), "", ""),
        ("kept", count(found.kept), percent(found.kept / total), "kept"),
        ("pruned", count(found.pruned), percent(found.pruned / total), "pruned"),
        ("rejected", count(rejected), percent(rejected / total), "rejected"),
    ]


def _number_of_runs(manifest: Mapping[str, Any]) -> int:
    return len({entry.get("run", 0) for entry in manifest.get("checkpoints") or []})


def _notes(found: Findings, quality: Mapping[str, Any], runs: int) -> list[str]:
    notes = []
    precision, base_rate = quality.get("precision"), quality.get("base_rate")
    if isinstance(precision, float) and isinstance(base_rate, float):
        notes.append(
            f"Known for this data: {percent(precision)} of the pruned pairs are wrong, {percent(base_rate)} of all."
        )
    if found.missing_shards:
        notes.append(
            f"{plural(found.missing_shards, 'shard')} of {count(found.missing_shards + len(found.shards))} have no "
            "scores; their pairs are in none of these numbers."
        )
    broken = sum(1 for info in found.shards if info.end_error)
    if broken:
        notes.append(f"{plural(broken, 'input tar')} ended early or unreadably; what could be read is counted.")
    if found.significant:
        known = found.significant["known"]
        helpful, harmful = found.significant["helpful"] / known, found.significant["harmful"] / known
        note = (
            f"Over the proxy runs, {percent(helpful)} of the pairs are helpful and {percent(harmful)} harmful beyond "
        )
        note += "two standard errors of their utility."
        if runs > 1:
            chance = percent(float(stdtr(runs - 1, -2.0)))
            note += f" Without any effect {chance} would be on either side by chance, as there are {runs} runs."
        notes.append(note)
    return notes


@dataclass(frozen=True)
class _Scores:
    utility: Any
    densities: list[Any]


def _scores(found: Findings) -> _Scores | None:
    if found.histogram is None:
        return None
    densities = [density_figure(name, UNITS[name], density, found) for name, density in found.densities.items()]
    return _Scores(utility_figure(found.histogram, found.cut), densities)


def _checkpoints(found: Findings, names: list[str], manifest: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        (str(i + 1), str(int(entry.get("run", 0)) + 1), count(entry.get("step", 0)), number(entry.get("lr")))
        for i, entry in enumerate(manifest.get("checkpoints") or [])
    ]
    heads = ("checkpoint", "run", "step", "learning rate")
    table = tables.Table("Recorded checkpoints", heads, rows, frozenset({1, 2, 3})) if rows else None
    return {"figures": agreement_figures(found.sample.terms, names), "table": table}


def _comparison(comparison: Comparison, selection: str) -> dict[str, Any]:
    both, this, that, _ = (int(cell[0]) for cell in comparison.cells.values())
    see = (
        f"They share {plural(both, 'pair')}, {percent(comparison.jaccard)} of what either keeps; {count(this)} are "
        f"only in {selection} and {count(that)} only in {comparison.name}."
    )
    parts = (
        (this, "only-this", f"only {selection}"),
        (both, "kept", "both"),
        (that, "only-that", f"only {comparison.name}"),
    )
    return {
        "name": comparison.name,
        "see": see,
        "bar": stacked_bar([(amount, css) for amount, css, _ in parts]),
        "legend": [(css, word) for _, css, word in parts],
        "table": tables.comparison_table(comparison, selection),
    }


def _provenance(run: RunFolder, summary: Mapping[str, Any]) -> list[tables.Table | None]:
    return [
        tables.timing_table(summary.get("seconds") or {}),
        tables.throughput_table(summary.get("scores") or {}),
        tables.flat_table("Where it comes from", {"folder": run.root, **provenance(run)}),
    ]


def _contents(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    entries = [
        ("overview", "Overview", True),
        ("evaluation", "Training on it", context["evaluation"]),
        ("scores", "Scores", context["scores"]),
        ("predicted", "Predicted scores", context["predicted"]),
        ("pairs", "Pairs to look at", True),
        ("checkpoints", "Checkpoints", context["checkpoints"]),
        *((section.id, section.short, True) for section in context["group_sections"]),
        ("rejections", "Left out", True),
        ("selections", "Other selections", context["comparisons"]),
        ("settings", "Settings", True),
    ]
    return [(anchor, title) for anchor, title, there in entries if there]
