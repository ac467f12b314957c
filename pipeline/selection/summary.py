"""What a selection says about itself: `selection.json`, written last."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config import SelectConfig
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection.plan import GroupPlan, SelectionPlan
from pipeline.selection.write import Account, ShardKept
from pipeline.store import storage


@dataclass(frozen=True)
class SourceKept:
    """A source: its pairs, and how many of them are kept."""

    name: str
    pairs: int
    kept: int


@dataclass(frozen=True)
class SelectionSummary:
    """The content of `selection.json`. `total = kept + pruned + rejected` over their reasons.

    `scored` are the pairs a fraction is taken of; `threshold` the ranked value of the last pair kept (none where
    several groups have their own); `shortfall` the pairs that a fraction asks for beyond those that can be kept;
    `harmful_kept` the significantly harmful ones that the quota needed. `scores` is a fingerprint of all score files
    used. `seconds` is the time of each pass; `clusters` are those of the embeddings, where any were found. `folder` is
    empty for a dry run.
    """

    name: str
    folder: str
    scores: str
    seed: int
    config: dict[str, Any]
    total: int
    scored: int
    kept: int
    pruned: dict[str, int]
    rejected: dict[str, int]
    threshold: float | None
    shortfall: int
    harmful_kept: int
    groups: list[GroupPlan]
    sources: list[SourceKept]
    shards: list[ShardKept]
    seconds: dict[str, float]
    clusters: list[GroupPlan] = field(default_factory=list)


def summarise(
    plan: SelectionPlan, account: Account, config: SelectConfig, folder: str, seconds: dict[str, float]
) -> SelectionSummary:
    """The summary of a plan that was carried out (or of a dry run: `folder` is empty)."""
    sources = [SourceKept(name, count, account.kept[name]) for name, count in account.pairs.most_common()]
    return SelectionSummary(
        name=config.name,
        folder=folder,
        scores=plan.fingerprint,
        seed=plan.recipe.seed,
        config=config.model_dump(mode="json"),
        total=plan.total,
        scored=plan.scored,
        kept=plan.kept,
        pruned=plan.pruned,
        rejected=plan.rejected,
        threshold=plan.threshold,
        shortfall=plan.shortfall,
        harmful_kept=plan.harmful_kept,
        groups=plan.groups,
        sources=sources,
        shards=account.shards,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        clusters=[GroupPlan(f"cluster {number}", *counts) for number, counts in enumerate(account.clusters.T.tolist())],
    )


def summary_file(run: RunFolder, name: str) -> str:
    """Where the summary of selection `name` lies."""
    return storage.join(run.selection(name), "selection.json")


def begun_selections(run: RunFolder) -> list[str]:
    """Names of the selections that have a folder; `default` first."""
    names = ["default"] if storage.exists(run.selection()) else []
    fs, path = storage.filesystem(storage.join(run.root, "selections"))
    if fs.exists(path):
        found = (entry["name"].rstrip("/") for entry in fs.ls(path, detail=True) if entry["type"] == "directory")
        names += sorted(storage.basename(name) for name in found)
    return names


def write_summary(url: str, summary: SelectionSummary) -> None:
    """Commit a selection."""
    content = asdict(summary)
    del content["folder"]
    storage.write_json(url, content)


def read_summary(run: RunFolder, name: str) -> SelectionSummary:
    """The summary of a finished selection. Raises `StageError` where there is none."""
    url = summary_file(run, name)
    try:
        content = storage.read_json(url)
    except FileNotFoundError:
        others = [other for other in begun_selections(run) if storage.exists(summary_file(run, other))]
        there = f" (there are: {', '.join(others)})" if others else ""
        raise StageError(
            f"{url}: expected a finished selection {name!r}{there}; make it with `diffprune select`"
        ) from None
    content["groups"] = [GroupPlan(**entry) for entry in content["groups"]]
    content["clusters"] = [GroupPlan(**entry) for entry in content["clusters"]]
    content["sources"] = [SourceKept(**entry) for entry in content["sources"]]
    content["shards"] = [ShardKept(**entry) for entry in content["shards"]]
    return SelectionSummary(**content, folder=run.selection(name))
