"""From the config to a recipe: formulas checked against the columns there are, and the passes that formulas need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.compute as pc

from pipeline.arrays import Int64
from pipeline.config import SelectConfig
from pipeline.errors import ConfigError, InputError, StageError
from pipeline.run import RunFolder
from pipeline.selection.checks import check_section, joined_schemas, schema_of
from pipeline.selection.formula import Formula, parse_formula
from pipeline.selection.ranks import RankSketch, merged
from pipeline.selection.recipe import OpenShard, Recipe
from pipeline.selection.scan import ScoreFile, ScoreShard
from pipeline.selection.standardise import Moments, Standardisation, terms_matrix
from pipeline.selection.tasks import MapTasks, chunks
from pipeline.store import storage

#: Called with the name of each pass when it begins.
Progress = Callable[[str], None]


def make_recipe(config: SelectConfig, first: ScoreShard, seed: int, scratch: str) -> Recipe:
    """Check a select section against the columns of the score file `first` and of the joined runs.

    Raises `ConfigError` before anything is read but these schemas.
    """
    schemas = {"": schema_of(first.url), **joined_schemas(config.join, first.index)}
    formulas = check_section(config, schemas)
    return Recipe(
        by=formulas.by,
        where=formulas.where,
        spread=formulas.spread,
        significance=config.significance,
        fill=config.fill,
        seed=seed,
        join=config.join,
        embeddings=config.embeddings or "",
        scratch=scratch,
    )


def work_out(
    run: RunFolder, recipe: Recipe, shards: Sequence[ScoreShard], tell: Progress, map_tasks: MapTasks
) -> Recipe:
    """The passes that formulas need: do joined runs match, the moments of the terms, the ranks."""
    if recipe.join:
        tell("matching joined runs")
        for _ in map_tasks(partial(_match_joined, recipe), chunks(shards)):
            pass
    formulas = [formula for formula in (recipe.by, recipe.where, recipe.spread) if formula is not None]
    if any(formula.columns & {"zterms", "zterms_std"} for formula in formulas):
        tell("standardising terms")
        runs = _runs_of_terms(run, shards)
        parts = (part for task in map_tasks(partial(_moments, runs), chunks(shards)) for part in task)
        recipe = replace(recipe, zterms=Standardisation.of(parts, runs))
    ranked = tuple(dict.fromkeys(source for formula in formulas for source in formula.ranked))
    if ranked:
        tell("ranking")
        tasks = list(map_tasks(partial(_sketches, recipe, ranked), chunks(shards)))
        sketches = [merged(task[place] for task in tasks) for place in range(len(ranked))]
        recipe = replace(recipe, tables={source: s.table() for source, s in zip(ranked, sketches, strict=True)})
    if recipe.spread is not None and not _has_value(recipe, recipe.spread, shards):
        raise StageError(
            f"select.policy: significant needs {recipe.spread.source}, which is empty; it takes proxy.runs of 2 or more"
        )
    return recipe


def check_some_can_be_kept(recipe: Recipe, shards: Sequence[ScoreShard]) -> None:
    """Some pair that was scored has a value to be ranked by, and meets the condition. Raises `ConfigError`.

    It reads no further than the first such pair.
    """
    scored = not_finite = 0
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            for judged in opened.judged():
                if len(judged.value):
                    return
                scored += judged.scored
                not_finite += judged.rejected["not-finite"]
    if scored:
        assert recipe.where is not None  # nothing else rules out pairs before layers are written
        raise ConfigError("expected a condition that some pair meets", key="select.where", found=recipe.where.source)
    if not_finite:
        columns = [parse_formula(name, "select.by", {name}) for name in sorted(recipe.by.columns)]
        empty = [column.source for column in columns if not _has_value(recipe, column, shards)]
        because = f" ({', '.join(map(_emptiness, empty))})" if empty else ""
        raise ConfigError(f"expected a finite value of some pair{because}", key="select.by", found=recipe.by.source)


def _emptiness(column: str) -> str:
    takes = ": it takes proxy.runs of 2 or more" if column.endswith(("utility_std", "zterms_std")) else ""
    return f"{column} is empty throughout{takes}"


def _runs_of_terms(run: RunFolder, shards: Sequence[ScoreShard]) -> Int64:
    """The proxy run that each term belongs to [m]: from the checkpoints' manifest, which lists them in that order."""
    width = next((width for shard in shards if (width := _terms_width(shard))), 0)
    if width == 0:
        raise StageError(f"{run.scores}: expected scores with terms, found none")
    if not storage.exists(run.checkpoint_manifest):
        return np.zeros(width, dtype=np.int64)
    listed = storage.read_json(run.checkpoint_manifest)["checkpoints"]
    if len(listed) != width:
        return np.zeros(width, dtype=np.int64)
    return np.array([int(entry.get("run", 0)) for entry in listed], dtype=np.int64)


def _terms_width(shard: ScoreShard) -> int:
    with ScoreFile(shard.url) as file:
        for span in file.spans():
            longest = pc.max(span.arrow("terms").value_lengths()).as_py()
            if longest:
                return int(longest)
    return 0


def _has_value(recipe: Recipe, formula: Formula, shards: Sequence[ScoreShard]) -> bool:
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            if any(np.isfinite(opened.evaluate(formula, span)).any() for span in opened.spans()):
                return True
    return False


def _match_joined(recipe: Recipe, shards: Sequence[ScoreShard]) -> None:
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            uids = opened.file.parquet.read(columns=["uid"])["uid"]
            for name in recipe.join:
                with opened.open_joined(name) as other:
                    if other.parquet.read(columns=["uid"])["uid"] != uids:
                        raise InputError(f"{other.url}: expected the same pairs in the same order as {shard.url}")


def _moments(runs: Int64, shards: Sequence[ScoreShard]) -> list[Moments]:
    """Moments of the terms of the pairs that scored, one per shard."""
    found = []
    for shard in shards:
        total = Moments.none(len(runs))
        with ScoreFile(shard.url) as file:
            for span in file.spans():
                terms = terms_matrix(span.arrow("terms"), runs)
                sign = np.sign(span.numeric("utility").astype(np.float64) * span.numeric("score"))
                good = np.isfinite(terms).any(axis=1) & np.isfinite(sign)
                ok = span.ok()
                good = good if ok is None else good & ok
                total = total + Moments.of(terms[good], int(sign[good].sum()))
        found.append(total)
    return found


def _sketches(recipe: Recipe, ranked: tuple[str, ...], shards: Sequence[ScoreShard]) -> list[RankSketch]:
    """A sketch of each formula in `ranked` over the pairs with status ok."""
    found = [RankSketch() for _ in ranked]
    for shard in shards:
        with OpenShard(recipe, shard) as opened:
            known = set(opened.file.schema.names) | {"zterms", "zterms_std"} | _joined_names(opened)
            formulas = [parse_formula(source, "select", known) for source in ranked]
            for span in opened.spans():
                ok = span.ok()
                for formula, sketch in zip(formulas, found, strict=True):
                    value = opened.evaluate(formula, span).astype(np.float32)
                    sketch.add(value if ok is None else value[ok])
    return found


def _joined_names(opened: OpenShard) -> set[str]:
    names = set()
    for run in opened.recipe.join:
        with opened.open_joined(run) as other:
            names |= {f"{run}.{name}" for name in other.schema.names}
    return names
