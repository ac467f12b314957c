"""Checks what a config will choose from scores against the scores that it asks for, before any of them is there."""

from __future__ import annotations

from pipeline.config import Config, SelectConfig
from pipeline.errors import ConfigError
from pipeline.selection.checks import check_section, joined_schemas
from pipeline.store.scores import score_schema


def check_choices(config: Config) -> None:
    """Check that this config's scores have what its select section, and each of `evaluate.compare`, needs.

    Raises `ConfigError`. Scores that are there already may have been made with other settings: what is chosen from
    these is checked against their files.
    """
    own = score_schema(2 if config.score.embeddings else 0)
    for key, section in _sections(config).items():
        schemas = {"": own, **joined_schemas(section.join, key=key)}
        spread = check_section(section, schemas, key).spread
        proxy = config.proxy
        alone = proxy.checkpoints is None and proxy.runs == 1
        if spread is not None and alone and spread.columns & {"utility_std", "zterms_std"}:
            expected = f"expected proxy.runs of 2 or more for significant, which needs {spread.source}"
            raise ConfigError(expected, key=f"{key}.policy", found=proxy.runs)


def _sections(config: Config) -> dict[str, SelectConfig]:
    """The select sections that a run makes choices by, by their keys."""
    compared = config.evaluate.compare if config.evaluate is not None else {}
    plain = {**config.select.model_dump(), "keep": 1.0}  # each of them is as large as what is kept
    return {
        "select": config.select,
        **{f"evaluate.compare.{name}": SelectConfig.model_validate(plain | keys) for name, keys in compared.items()},
    }
