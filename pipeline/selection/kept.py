"""Which pairs a selection keeps, or would keep, as positions in the inventory; and the values it ranks by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq

from pipeline.arrays import Float64
from pipeline.config import SelectConfig
from pipeline.data.inventory import ShardInfo
from pipeline.data.positions import Positions, by_shard, offsets
from pipeline.errors import StageError
from pipeline.run import RunFolder
from pipeline.selection import layers
from pipeline.selection.plan import plan_selection
from pipeline.selection.prepare import make_recipe, work_out
from pipeline.selection.recipe import OpenShard
from pipeline.selection.scan import committed_shards
from pipeline.selection.tasks import MapTasks
from pipeline.selection.write import keep_file, taken_rows
from pipeline.store import storage


def kept_positions(folder: str, inventory: Sequence[ShardInfo]) -> Positions:
    """Global positions of the pairs that the finished selection in `folder` keeps, ascending.

    Raises `StageError` where there is none, or one over other shards than those of `inventory`.
    """
    try:
        listed = storage.read_json(storage.join(folder, "selection.json"))["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        raise StageError(f"{folder}: expected the folder of a finished selection, with a selection.json") from None
    rows = {line["shard"]: (storage.basename(line["url"]), line["rows"]) for line in listed}
    parts = [np.empty(0, np.int64)]
    for start, info in zip(offsets(inventory), inventory, strict=False):
        if info.index not in rows:
            continue
        if rows[info.index] != (info.name, info.samples):
            name, count = rows[info.index]
            raise StageError(
                f"{folder}: expected a selection over the same shards, found {name} with {count} samples in place of "
                f"{info.name} with {info.samples}"
            )
        with storage.open_read(keep_file(folder, info.index)) as handle:
            parts.append(pq.read_table(handle, columns=["index"])["index"].to_numpy().astype(np.int64) + start)
    return np.concatenate(parts)


def chosen_positions(
    run: RunFolder,
    config: SelectConfig,
    inventory: Sequence[ShardInfo],
    *,
    seed: int,
    map_tasks: MapTasks = map,
    without: Positions | None = None,
) -> Positions:
    """Global positions of the pairs that a selection would keep, ascending; it leaves nothing on storage.

    It chooses as if the pairs at the positions `without` had not scored. Raises as `plan_selection` does.
    """
    starts = offsets(inventory)
    parts = [np.empty(0, np.int64)]
    barred = np.empty(0, np.int64) if without is None else np.sort(without)
    left_out = {info.index: rows for info, _, rows in by_shard(inventory, barred)}
    with _scratch(run, config) as scratch:
        plan = plan_selection(run, config, seed=seed, scratch=scratch, map_tasks=map_tasks, left_out=left_out)
        for shard in plan.shards:
            with OpenShard(plan.recipe, shard) as opened:
                for judged in opened.judged():
                    parts.append(judged.places()[taken_rows(plan, judged, shard.index)] + starts[shard.index])
    return np.concatenate(parts)


def ranked_values(
    run: RunFolder, config: SelectConfig, inventory: Sequence[ShardInfo], *, seed: int, map_tasks: MapTasks = map
) -> Float64:
    """The value that a selection ranks each sample by, float64 `[samples]`; NaN where there is none."""
    starts = offsets(inventory)
    values = np.full(int(starts[-1]), np.nan)
    with _scratch(run, config) as scratch:
        shards, _ = committed_shards(run)
        recipe = work_out(run, make_recipe(config, shards[0], seed, scratch), shards, lambda _: None, map_tasks)
        for shard in shards:
            with OpenShard(recipe, shard) as opened:
                for span in opened.spans():
                    start = starts[shard.index] + span.start
                    values[start : start + span.rows] = opened.evaluate(recipe.by, span)
    return values


@contextmanager
def _scratch(run: RunFolder, config: SelectConfig) -> Iterator[str]:
    """A folder for the passes of a selection that is not kept."""
    scratch = storage.join(run.root, "scratch", f"choose-{config.name}")
    layers.remove_all(scratch)
    try:
        yield scratch
    finally:
        layers.remove_all(scratch)
