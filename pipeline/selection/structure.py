"""The passes that look at pairs together: duplicates, clusters, frequent captions, and what a pair adds to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.arrays import Float64, Int64
from pipeline.config import SelectConfig
from pipeline.selection import duplicates, redundancy
from pipeline.selection.clusters import (
    MOST_CLUSTERS,
    PART_PAIRS,
    Clusters,
    find_clusters,
    image_embeddings,
    write_parts,
)
from pipeline.selection.cuts import take_census
from pipeline.selection.grouping import frequent_captions
from pipeline.selection.prepare import Progress
from pipeline.selection.recipe import HARMFUL, NEAR_DUPLICATE, Judged, OpenShard, Recipe
from pipeline.selection.regroup import bring_back, evaluate_buckets, place_rows, regroup
from pipeline.selection.runs import Rows
from pipeline.selection.scan import ScoreShard
from pipeline.selection.standardise import Moments
from pipeline.selection.tasks import MapTasks, chunks

#: Pairs of the parts that are loaded together (about 1 kB each with 512 dimensions).
BATCH_PAIRS = 1 << 16


def find_structure(
    config: SelectConfig, recipe: Recipe, shards: Sequence[ScoreShard], tell: Progress, map_tasks: MapTasks
) -> tuple[Recipe, Clusters | None]:
    """Work out the layers that a select section needs, in the order in which they build on each other."""
    if config.dedup.exact:
        tell("finding exact duplicates")
        recipe = duplicates.find_exact(recipe, shards, _pairs(recipe, shards, map_tasks), map_tasks)
    if config.dedup.cosine is not None:
        recipe = _drop_near_duplicates(config.dedup.cosine, recipe, shards, tell, map_tasks)
    fill = config.fill if config.policy == "significant" else ""
    preferring = config.policy == "infomax" or fill in ("representative", "diverse")
    clusters = None
    if preferring or config.balance.by == "cluster":
        tell("clustering")
        pairs = _pairs(recipe, shards, map_tasks)
        clusters = find_clusters(recipe, shards, pairs, config.balance.clusters, PART_PAIRS, map_tasks)
        tell("assigning clusters")
        batches = _Batches.of(write_parts(recipe, shards, clusters, 0.0, map_tasks))
        recipe = replace(recipe.with_layer("part").with_layer("cluster"), clusters=len(clusters.complexity))
        if preferring:
            tell("weighing redundancy")
            scale = _value_moments(recipe, shards, map_tasks)
            rows = partial(_part_rows, batches, scale)
            regrouped = regroup(recipe, shards, "neighbours", batches.count, rows, map_tasks)
            work = {
                "representative": redundancy.representative,
                "diverse": redundancy.diverse,
            }.get(fill, partial(redundancy.infomax, redundancy=config.redundancy))
            evaluate_buckets(regrouped, work, map_tasks)
            bring_back(regrouped, "preference", -np.inf, "f4", map_tasks)
            recipe = recipe.with_layer("preference")
    if config.balance.by == "cluster" and clusters is not None:
        recipe = replace(recipe, grouping="cluster")
    elif config.balance.by == "caption":
        tell("counting captions")
        recipe = replace(recipe, grouping="caption", captions=frequent_captions(recipe, shards, map_tasks))
    return recipe, clusters


def _drop_near_duplicates(
    cosine: float, recipe: Recipe, shards: Sequence[ScoreShard], tell: Progress, map_tasks: MapTasks
) -> Recipe:
    """Write the layer `near-duplicate`."""
    tell("parting for near-duplicates")
    pairs = _pairs(recipe, shards, map_tasks)
    count = min(-(-pairs // duplicates.PART_PAIRS), MOST_CLUSTERS)
    parts = find_clusters(recipe, shards, pairs, count, duplicates.PART_PAIRS, map_tasks)
    batches = _Batches.of(write_parts(recipe, shards, parts, duplicates.border_margin(cosine), map_tasks))
    tell("finding near-duplicates")
    regrouped = regroup(recipe, shards, "near", batches.count, partial(_part_rows, batches, None), map_tasks)
    evaluate_buckets(regrouped, partial(duplicates.near_duplicates, cosine=cosine), map_tasks)
    bring_back(regrouped, NEAR_DUPLICATE, 0, "u1", map_tasks)
    return recipe.with_layer(NEAR_DUPLICATE)


@dataclass(frozen=True)
class _Batches:
    """Parts that are loaded together: the batch of each part [p]."""

    of_part: Int64
    count: int

    @staticmethod
    def of(sizes: Int64) -> _Batches:
        """Consecutive parts of together about `BATCH_PAIRS` pairs; a larger part is a batch of its own."""
        before = np.cumsum(sizes) - sizes
        _, of_part = np.unique(before // BATCH_PAIRS, return_inverse=True)
        return _Batches(of_part.astype(np.int64), int(of_part.max()) + 1)


def _pairs(recipe: Recipe, shards: Sequence[ScoreShard], map_tasks: MapTasks) -> int:
    return int(take_census(recipe, shards, map_tasks).sizes.sum())


def _part_rows(
    batches: _Batches, scale: tuple[float, float] | None, opened: OpenShard, judged: Judged
) -> tuple[Rows, Int64]:
    """Rows with their embedding, once for each part that they are looked at in; with `scale` (mean, deviation) also the
    standardised value and the tier, and without harmful rows."""
    vectors = image_embeddings(opened, judged)
    chosen = np.arange(len(judged.value))
    tiers = opened.recipe.tiers
    tier = np.zeros(len(chosen), np.int32) if judged.stratum is None or tiers == 1 else judged.stratum % tiers
    if scale is not None and tiers > 1:
        chosen = np.flatnonzero(tier != HARMFUL)
    parts = opened.layer("part", judged.span)[judged.places() - judged.span.start][chosen]
    place, probe = np.nonzero(parts >= 0)
    chosen, part = chosen[place], parts[place, probe]
    extra: list[tuple[Any, ...]] = [("part", "i4"), ("home", "?"), ("embedding", "f2", (vectors.shape[1],))]
    if scale is not None:
        extra += [("value", "f4"), ("tier", "i4")]
    rows = place_rows(judged, opened.shard.index, chosen, extra)
    rows["part"], rows["home"], rows["embedding"] = part, probe == 0, vectors[chosen]
    if scale is not None:
        rows["value"] = (judged.value[chosen] - scale[0]) / scale[1]
        rows["tier"] = tier[chosen]
    return rows, batches.of_part[part]


def _value_moments(recipe: Recipe, shards: Sequence[ScoreShard], map_tasks: MapTasks) -> tuple[float, float]:
    """Mean and standard deviation of the value of all pairs that can be kept."""
    total = Moments.none(1)
    for task in map_tasks(partial(_moments_of_shards, recipe), chunks(shards)):
        for part in task:
            total = total + part
    deviation = float(np.sqrt(total.squares[0] / max(total.count[0], 1)))
    return float(total.mean[0]), deviation or 1.0


def _moments_of_shards(recipe: Recipe, shards: Sequence[ScoreShard]) -> list[Moments]:
    found = []
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            values: list[Float64] = [j.value.astype(np.float64)[:, None] for j in opened.judged()]
        found.append(Moments.of(np.concatenate(values) if values else np.empty((0, 1)), 0))
    return found
