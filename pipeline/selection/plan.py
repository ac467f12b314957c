"""From a config to the exact boundaries of a selection: everything that is decided before a file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.arrays import Int64
from pipeline.config import Band, SelectConfig, Threshold
from pipeline.errors import ConfigError
from pipeline.run import RunFolder
from pipeline.selection import grouping, prepare, structure
from pipeline.selection.boundaries import Boundaries
from pipeline.selection.bracket import guess
from pipeline.selection.clusters import Clusters
from pipeline.selection.cuts import COLLECT, Census, count_taken, find_boundaries, take_census
from pipeline.selection.keys import order_keys, value_of
from pipeline.selection.prepare import Progress
from pipeline.selection.quotas import Counts, count_of, share_out
from pipeline.selection.recipe import HARMFUL, Recipe
from pipeline.selection.scan import ScoreShard, committed_shards, joined_fingerprint
from pipeline.selection.tasks import MapTasks


@dataclass(frozen=True)
class GroupPlan:
    """A group of pairs: how many of it could be kept, and how many are."""

    name: str
    size: int
    kept: int


@dataclass(frozen=True)
class SelectionPlan:
    """What a selection will keep. `total = kept + pruned + rejected` over their reasons.

    `skip` are the boundaries above which pairs are too easy (bands), `end` those down to which pairs are kept.
    `threshold` is the ranked value of the last pair kept, where a single ranking is cut. `shortfall` is by how many
    pairs a fraction exceeds those that can be kept; `harmful_kept` is how many significantly harmful pairs were needed
    to meet the quota.
    """

    recipe: Recipe
    shards: Sequence[ScoreShard]
    fingerprint: str
    skip: Boundaries | None
    end: Boundaries
    total: int
    scored: int
    kept: int
    pruned: dict[str, int]
    rejected: dict[str, int]
    groups: list[GroupPlan] = field(default_factory=list)
    threshold: float | None = None
    shortfall: int = 0
    harmful_kept: int = 0


def plan_selection(
    run: RunFolder,
    config: SelectConfig,
    *,
    seed: int,
    scratch: str,
    progress: Progress | None = None,
    map_tasks: MapTasks = map,
    left_out: Mapping[int, Int64] | None = None,
) -> SelectionPlan:
    """Work out which pairs of a run a selection keeps, with memory that does not grow with their number.

    Rows `left_out`, by the number of their shard, count as not scored.
    Passes that later ones need per row go to files under `scratch`, which the caller removes.
    Raises `ConfigError` for a config that does not fit the scores (before any pass), rules out every pair or asks for
    more than there are, `StageError` without scores, `InputError` for joined runs over other pairs.
    """
    tell = progress or (lambda _: None)
    shards, own = committed_shards(run)
    recipe = replace(prepare.make_recipe(config, shards[0], seed, scratch), left_out=left_out or {})
    fingerprint = joined_fingerprint(own, config.join)
    recipe = prepare.work_out(run, recipe, shards, tell, map_tasks)
    prepare.check_some_can_be_kept(recipe, shards)
    recipe, clusters = structure.find_structure(config, recipe, shards, tell, map_tasks)
    tell("counting")
    single = config.keep if isinstance(config.keep, float | int) else None
    bracket = guess(recipe, shards, single, COLLECT, map_tasks) if single is not None else None
    census = take_census(recipe, shards, map_tasks, bracket)
    skipped, taken, shortfall = _ranks(config, recipe, census, clusters)
    tell("finding the cut")
    skip = None
    if isinstance(config.keep, Threshold):
        key = order_keys(np.array([config.keep.threshold], dtype=np.float32)).astype(np.int64)
        end = Boundaries.at_keys(key)
        taken = count_taken(recipe, shards, end, map_tasks)
    else:
        end = find_boundaries(recipe, shards, census, skipped + taken, map_tasks)
        if skipped.any():
            skip = find_boundaries(recipe, shards, census, skipped, map_tasks)
    plan = _plan(recipe, shards, fingerprint, census, (skip, end), taken, shortfall)
    if isinstance(config.keep, Threshold) and plan.scored and not plan.kept:
        expected = "expected a threshold that some pair reaches"
        raise ConfigError(expected, key="select.keep.threshold", found=config.keep.threshold)
    return plan


def _ranks(
    config: SelectConfig, recipe: Recipe, census: Census, clusters: Clusters | None
) -> tuple[Counts, Counts, int]:
    """Per stratum [s], how many pairs from the top are skipped and how many after them are kept; and the shortfall."""
    sizes = census.sizes.reshape(recipe.groups, recipe.tiers)
    group_sizes = sizes.sum(axis=1)
    available = int(group_sizes.sum())
    skipped = np.zeros_like(group_sizes)
    shortfall = 0
    keep = config.keep
    if isinstance(keep, Threshold):
        return np.zeros_like(census.sizes), np.zeros_like(census.sizes), 0
    if isinstance(keep, Band):
        highest = count_of(keep.drop_highest, available)
        total = max(available - highest - count_of(keep.drop_lowest, available), 0)
        skipped = share_out(highest, group_sizes.astype(np.float64), group_sizes)
    elif isinstance(keep, float):
        total = count_of(keep, census.scored)
        shortfall = max(total - available, 0)
    else:
        total = keep
        if total > available:
            expected = f"expected at most the {available:,} pairs that can be kept"
            raise ConfigError(expected, key="select.keep", found=total)
    weights = group_sizes.astype(np.float64)
    if config.balance.quota == "equal":
        weights = np.ones(len(group_sizes))
    elif config.balance.quota == "complexity" and clusters is not None:
        weights = clusters.weights()
    quotas = share_out(total, weights, group_sizes - skipped)
    below = np.cumsum(sizes, axis=1) - sizes
    taken = np.clip(quotas[:, None] - below, 0, sizes)
    return np.pad(skipped[:, None], ((0, 0), (0, recipe.tiers - 1))).reshape(-1), taken.reshape(-1), shortfall


def _plan(
    recipe: Recipe,
    shards: Sequence[ScoreShard],
    fingerprint: str,
    census: Census,
    boundaries: tuple[Boundaries | None, Boundaries],
    taken: Counts,
    shortfall: int,
) -> SelectionPlan:
    sizes = census.sizes.reshape(recipe.groups, recipe.tiers)
    kept = taken.reshape(recipe.groups, recipe.tiers)
    cut = (sizes - kept).sum(axis=0)
    pruned = census.pruned.copy()
    if recipe.tiers > 1:
        pruned["harmful"] += int(cut[HARMFUL])
        pruned["quota"] += int(cut[:HARMFUL].sum())
    else:
        pruned["quota"] += int(cut.sum())
    skip, end = boundaries
    key = int(end.key[0])
    by_value = recipe.strata == 1 and "preference" not in recipe.layers
    names = grouping.group_names(recipe)
    return SelectionPlan(
        recipe=recipe,
        shards=shards,
        fingerprint=fingerprint,
        skip=skip,
        end=end,
        total=census.rows,
        scored=census.scored,
        kept=int(kept.sum()),
        pruned={reason: count for reason, count in sorted(pruned.items()) if count},
        rejected=dict(sorted(census.rejected.items())),
        groups=[
            GroupPlan(*of) for of in zip(names, sizes.sum(axis=1).tolist(), kept.sum(axis=1).tolist(), strict=True)
        ],
        threshold=value_of(key) if by_value and 0 <= key < 1 << 32 else None,
        shortfall=shortfall,
        harmful_kept=int(kept[:, HARMFUL].sum()) if recipe.tiers > 1 else 0,
    )
