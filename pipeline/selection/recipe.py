"""What a selection makes of a row: its value, whether it can be kept, its stratum, and its order key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrays import Bool, Float32, Int32, Int64, UInt32
from pipeline.errors import InputError
from pipeline.run import RunFolder
from pipeline.selection import layers
from pipeline.selection.formula import Formula
from pipeline.selection.keys import order_keys, seeded_draw
from pipeline.selection.ranks import RankTable
from pipeline.selection.scan import SPAN_ROWS, ScoreFile, ScoreShard, Span
from pipeline.selection.standardise import Standardisation

#: Layers that rule out pairs where they are not 0, named after the reason.
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near-duplicate"
#: Why rows of `Recipe.left_out` count as rejected.
LEFT_OUT = "left-out"
#: Tiers of `significant`, in the order in which a quota is filled.
HELPFUL, TIE, HARMFUL = 0, 1, 2


@dataclass(frozen=True)
class Recipe:
    """Everything that decides about a row, as far as it has been worked out; sent to every task.

    `tables` are the ranks the formulas need; `zterms` how the per-checkpoint terms are standardised; `join` folders
    of other runs by name, `embeddings` the one of them whose embeddings are used; `captions` the sorted caption ids
    that are groups of their own; `left_out` the rows of each shard, by its number, that count as not scored; `scratch`
    where the layers (values per row that earlier passes worked out) lie, and `layers` which there are.
    """

    by: Formula
    where: Formula | None
    spread: Formula | None
    significance: float
    fill: str
    seed: int
    join: dict[str, str]
    embeddings: str = ""
    tables: dict[str, RankTable] = field(default_factory=dict)
    zterms: Standardisation | None = None
    grouping: Literal["none", "caption", "cluster"] = "none"
    captions: Int64 | None = None
    clusters: int = 0
    left_out: Mapping[int, Int64] = field(default_factory=dict)
    scratch: str = ""
    layers: frozenset[str] = frozenset()

    @property
    def groups(self) -> int:
        """Groups that quotas are shared out over; the last one of `caption` holds the rare captions."""
        if self.grouping == "caption":
            return len(self.captions) + 1 if self.captions is not None else 1
        return self.clusters if self.grouping == "cluster" else 1

    @property
    def tiers(self) -> int:
        """Tiers within a group that a quota is filled from one after the other."""
        return 3 if self.spread is not None else 1

    @property
    def strata(self) -> int:
        """Groups times tiers: stratum `group * tiers + tier`."""
        return self.groups * self.tiers

    def with_layer(self, name: str) -> Recipe:
        """The recipe, once layer `name` has been written."""
        return replace(self, layers=self.layers | {name})


@dataclass
class Judged:
    """The rows of a span that can be kept, and the count of the others.

    `rows` [k] are places in the span (None: all of it, in order); `value` float32 [k], `keys` uint32 [k] (higher is
    kept first), `stratum` int32 [k] (None: all 0). `rejected` counts rows without a score by reason, `pruned` those
    with a score that a condition or a duplicate rules out, and `scored` all with a score.
    """

    span: Span
    rows: Int64 | None
    value: Float32
    keys: UInt32
    stratum: Int32 | None
    scored: int
    rejected: Counter[str]
    pruned: Counter[str]

    def places(self) -> Int64:
        """Row numbers within the shard [k]."""
        rows = np.arange(self.span.rows) if self.rows is None else self.rows
        return rows + self.span.start


class OpenShard:
    """A score file with what belongs to it: the same shard of joined runs, and the layers."""

    def __init__(self, recipe: Recipe, shard: ScoreShard) -> None:
        self.recipe = recipe
        self.shard = shard
        self.file = ScoreFile(shard.url)
        self._joined: dict[tuple[str, str], npt.NDArray[Any]] = {}
        self._layers: dict[str, npt.NDArray[Any]] = {}
        self._embeddings: pa.Array | None = None

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.__exit__()

    def spans(self) -> Iterator[Span]:
        """The shard's rows, a bounded number at a time."""
        return self.file.spans()

    def layer(self, name: str, span: Span) -> npt.NDArray[Any]:
        """Values of layer `name` for the rows of `span`."""
        if name not in self._layers:
            self._layers[name] = layers.read(self.recipe.scratch, name, self.shard.index)
        return self._layers[name][span.start : span.start + span.rows]

    def joined(self, run: str, column: str) -> npt.NDArray[Any]:
        """A numeric column of the same shard of the joined run `run` (whole shard)."""
        if (run, column) not in self._joined:
            with self.open_joined(run) as other:
                parts = [span.numeric(column) for span in other.spans()]
            self._joined[run, column] = np.concatenate(parts) if parts else np.empty(0, np.float32)
        return self._joined[run, column]

    def open_joined(self, run: str) -> ScoreFile:
        """The score file of the same shard in the joined run. Raises `InputError` unless it has as many rows."""
        url = RunFolder(self.recipe.join[run]).score_file(self.shard.index)
        try:
            other = ScoreFile(url)
        except FileNotFoundError:
            raise InputError(f"{url}: expected scores of the shard {self.shard.source}, found no file") from None
        if other.rows != self.file.rows:
            raise InputError(f"{url}: expected the {self.file.rows} rows of {self.shard.url}, found {other.rows}")
        return other

    def joined_embeddings(self, span: Span) -> pa.Array:
        """The `embedding` column, for the rows of `span`, of the joined run that `recipe.embeddings` names."""
        if self._embeddings is None:
            with self.open_joined(self.recipe.embeddings) as other:
                self._embeddings = other.parquet.read(columns=["embedding"])["embedding"].combine_chunks()
        return self._embeddings.slice(span.start, span.rows)

    def columns(self, names: frozenset[str], span: Span) -> dict[str, npt.NDArray[Any]]:
        """Columns by the names that formulas use, as float64 (a lone float32 column stays as it is)."""
        found: dict[str, npt.NDArray[Any]] = {}
        zterms = names & {"zterms", "zterms_std"}
        if zterms:
            assert self.recipe.zterms is not None
            found["zterms"], found["zterms_std"] = self.recipe.zterms.combine(span.arrow("terms"))
        own = [name for name in sorted(names) if "." not in name and name not in zterms]
        span.load(own)
        for name in own:
            found[name] = span.numeric(name)
        for name in names:
            run, dot, column = name.partition(".")
            if dot:
                found[name] = self.joined(run, column)[span.start : span.start + span.rows]
        if len(names) > 1:
            return {name: found[name].astype(np.float64) for name in names}
        return found

    def evaluate(self, formula: Formula, span: Span) -> npt.NDArray[Any]:
        """The formula's value per row [rows]: bool for a condition, else float32."""
        columns = self.columns(formula.columns, span)
        if formula.column is not None:
            return columns[formula.column].astype(np.float32, copy=False)
        wide = {name: values.astype(np.float64, copy=False) for name, values in columns.items()}
        texts = {name: span.arrow(name) for name in sorted(formula.texts)}
        result = np.broadcast_to(formula.evaluate({**wide, **texts}, self.recipe.tables), (span.rows,))
        with np.errstate(over="ignore"):
            return result if result.dtype == np.bool_ else result.astype(np.float32)

    def scored(self, span: Span, rejected: Counter[str]) -> tuple[Float32, Bool | None]:
        """The ranked value per row, and which rows have one (None: all); the others are counted by reason."""
        value = self.evaluate(self.recipe.by, span).astype(np.float32, copy=False)
        finite = np.isfinite(value)
        ok = span.ok()
        if ok is None and finite.all():
            return value, None
        if ok is not None:
            for entry in span.arrow("status").filter(~ok).value_counts().to_pylist():
                rejected[str(entry["values"])] += int(entry["counts"])
        scored = finite if ok is None else finite & ok
        not_finite = int((~finite if ok is None else ok & ~finite).sum())
        if not_finite:
            rejected["not-finite"] += not_finite
        return value, scored

    def judge(self, span: Span) -> Judged:
        """Everything the recipe says about the rows of `span`."""
        recipe = self.recipe
        rejected: Counter[str] = Counter()
        pruned: Counter[str] = Counter()
        value, mask = self.scored(span, rejected)
        mask = self._without_left_out(span, mask, rejected)
        scored = span.rows if mask is None else int(mask.sum())
        if recipe.where is not None:
            meets = self.evaluate(recipe.where, span)
            mask, before = (meets if mask is None else mask & meets), scored
            pruned["where"] = before - int(mask.sum())
        for reason in (DUPLICATE, NEAR_DUPLICATE):
            if reason in recipe.layers:
                dropped = self.layer(reason, span) != 0
                pruned[reason] = int((dropped if mask is None else dropped & mask).sum())
                mask = ~dropped if mask is None else mask & ~dropped
        rows = None if mask is None else np.flatnonzero(mask)
        value = value if rows is None else value[rows]
        tier = self._tiers(span, rows, value)
        keys = self._keys(span, rows, value, tier)
        return Judged(span, rows, value, keys, self._strata(span, rows, tier), scored, rejected, pruned)

    def _without_left_out(self, span: Span, scored: Bool | None, rejected: Counter[str]) -> Bool | None:
        rows = self.recipe.left_out.get(self.shard.index)
        if rows is None:
            return scored
        stays = np.ones(span.rows, dtype=bool)
        stays[rows[(rows >= span.start) & (rows < span.start + span.rows)] - span.start] = False
        rejected[LEFT_OUT] += int((~stays if scored is None else ~stays & scored).sum())
        return stays if scored is None else stays & scored

    def judged(self, rows: int = SPAN_ROWS) -> Iterator[Judged]:
        """`judge` for every span of the shard, of about `rows` rows."""
        return (self.judge(span) for span in self.file.spans(rows))

    def _tiers(self, span: Span, rows: Int64 | None, value: Float32) -> Int32 | None:
        if self.recipe.spread is None:
            return None
        spread = _at(self.evaluate(self.recipe.spread, span), rows)
        margin = np.where(np.isfinite(spread), np.float32(self.recipe.significance) * spread, np.float32(np.inf))
        tier = np.full(len(value), TIE, dtype=np.int32)
        tier[value > margin] = HELPFUL
        tier[value < -margin] = HARMFUL
        return tier

    def _keys(self, span: Span, rows: Int64 | None, value: Float32, tier: Int32 | None) -> UInt32:
        recipe = self.recipe
        if tier is None:
            if "preference" in recipe.layers:
                return order_keys(np.ascontiguousarray(_at(self.layer("preference", span), rows)))
            return order_keys(value)
        keys = order_keys(value)
        ties = tier == TIE
        if recipe.fill == "random":
            high, low = span.uids()
            draw = seeded_draw(_at(high, rows)[ties], _at(low, rows)[ties], recipe.seed)
            keys[ties] = (draw >> np.uint64(32)).astype(np.uint32)
        elif "preference" in recipe.layers:
            keys[ties] = order_keys(_at(self.layer("preference", span), rows)[ties])
        return keys

    def _strata(self, span: Span, rows: Int64 | None, tier: Int32 | None) -> Int32 | None:
        group = self.group(span, rows)
        if group is None:
            return tier
        return group if tier is None else group * np.int32(self.recipe.tiers) + tier

    def group(self, span: Span, rows: Int64 | None) -> Int32 | None:
        """The group of each of `rows` [k] int32; None where all are in one."""
        recipe = self.recipe
        if recipe.grouping == "cluster" and "cluster" in recipe.layers:
            return _at(self.layer("cluster", span), rows).astype(np.int32, copy=False)
        if recipe.grouping == "caption" and recipe.captions is not None:
            ids, rare = _at(caption_ids(span), rows), len(recipe.captions)
            place = np.searchsorted(recipe.captions, ids)
            # The entry behind the last caption may be anything: who is placed there is rare either way.
            return np.where(np.append(recipe.captions, 0)[place] == ids, place, rare).astype(np.int32)
        return None


def caption_ids(span: Span) -> Int64:
    """The caption hashes of a span [rows], 0 where there is none."""
    column = span.arrow("caption_id")
    return np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _at(values: npt.NDArray[Any], rows: Int64 | None) -> npt.NDArray[Any]:
    return values if rows is None else values[rows]
