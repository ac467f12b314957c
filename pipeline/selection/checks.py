"""Checks a select section against the columns of scores: of files on storage, or of those that a run will write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config import SelectConfig, Threshold
from pipeline.errors import ConfigError
from pipeline.run import RunFolder
from pipeline.selection.formula import Formula, parse_formula
from pipeline.selection.scan import ScoreFile
from pipeline.store import storage


@dataclass(frozen=True)
class Formulas:
    """The formulas of a select section, checked; `spread` only with `significant`."""

    by: Formula
    where: Formula | None
    spread: Formula | None


def check_section(config: SelectConfig, schemas: Mapping[str, pa.Schema], key: str = "select") -> Formulas:
    """Check a select section against the columns there are.

    Args:
        schemas: the columns of the run's own score files under "", those of joined runs under their names.
        key: what the section is called in errors.

    Raises `ConfigError`.
    """
    own = schemas[""]
    known = _numeric(own) | ({"zterms", "zterms_std"} if "terms" in own.names else set())
    for name in config.join:
        known |= {f"{name}.{column}" for column in _numeric(schemas[name])}
    significant = config.policy == "significant"
    spread = config.spread or ("zterms_std" if config.by == "zterms" else "utility_std")
    formulas = Formulas(
        by=parse_formula(config.by, f"{key}.by", known),
        where=parse_formula(config.where, f"{key}.where", known, _texts(own), condition=True) if config.where else None,
        spread=parse_formula(spread, f"{key}.spread", known) if significant else None,
    )
    _check_columns(config, schemas, key)
    return formulas


def joined_schemas(join: Mapping[str, str], shard: int | None = None, key: str = "select") -> dict[str, pa.Schema]:
    """The columns of joined runs, by name: in the scores of input shard number `shard`, or of any shard.

    Raises `ConfigError` where there are none.
    """
    schemas = {}
    for name, root in join.items():
        if not name.isidentifier():
            raise ConfigError("expected a name of letters, digits and '_'", key=f"{key}.join", found=name)
        run = RunFolder(root)
        urls = storage.list_files(run.scores, ".parquet") if shard is None else [run.score_file(shard)]
        if not urls or not storage.exists(urls[0]):
            raise ConfigError("expected the folder of a run with finished scores", key=f"{key}.join.{name}", found=root)
        schemas[name] = schema_of(urls[0])
    return schemas


def schema_of(url: str) -> pa.Schema:
    """The columns of a score file."""
    with ScoreFile(url) as file:
        return file.schema


def _numeric(schema: pa.Schema) -> set[str]:
    kinds = (pa.types.is_integer, pa.types.is_floating)
    return {item.name for item in schema if any(kind(item.type) for kind in kinds)}


def _texts(schema: pa.Schema) -> set[str]:
    return {item.name for item in schema if pa.types.is_string(item.type) or pa.types.is_dictionary(item.type)}


def _check_columns(config: SelectConfig, schemas: Mapping[str, pa.Schema], section: str) -> None:
    if isinstance(config.keep, Threshold) and (config.policy != "rank" or config.balance.by != "none"):
        raise ConfigError("expected a fraction or a count with a policy or a balance", key=f"{section}.keep")
    if config.embeddings is not None and config.embeddings not in schemas:
        raise ConfigError("expected the name of a joined run", key=f"{section}.embeddings", found=config.embeddings)
    needs = {
        "dedup.exact": config.dedup.exact and "content",
        "balance.by": config.balance.by == "caption" and "caption_id",
    }
    for key, column in needs.items():
        if column and column not in schemas[""].names:
            raise ConfigError(f"expected scores with a column {column!r}, found none", key=f"{section}.{key}")
    if config.balance.quota == "complexity" and config.balance.by != "cluster":
        raise ConfigError(
            "expected balance.by: cluster with complexity", key=f"{section}.balance", found=config.balance.by
        )
    embedded = {
        "dedup.cosine": config.dedup.cosine is not None,
        "balance.by": config.balance.by == "cluster",
        "policy": config.policy == "infomax",
        "fill": config.policy == "significant" and config.fill in ("representative", "diverse"),
    }
    for key, wanted in embedded.items():
        if wanted and "embedding" not in schemas[config.embeddings or ""].names:
            raise ConfigError(
                "expected scores with embeddings (score.embeddings: true), found none", key=f"{section}.{key}"
            )
