"""Reading a config from YAML.

A config is checked as a whole before any work; what is wrong with it is one `ConfigError` that names the file, the key,
what was expected and what was found.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.base import Section
from pipeline.config.problems import first_problem
from pipeline.config.tree import Config
from pipeline.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Plain YAML in which `5e-4` is a number, as in YAML 1.2, and a key that stands twice in one mapping an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice in one section", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None, out: str | None = None) -> Config:
    """Read a YAML config, apply `a.b=c` overrides (values are YAML) and check everything.

    Relative shard paths are relative to the working directory, as on any command line.
    Raises `ConfigError` for whatever is wrong.
    """
    name = os.fspath(path)
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError("expected a config file, found nothing there", file=name) from None
    except IsADirectoryError:
        inside = os.path.join(name, "config.yaml")
        there = f"; the config of this run is {inside}" if os.path.exists(inside) else ""
        raise ConfigError(f"expected a config file, found a folder{there}", file=name) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"expected readable YAML: {_where(error)}", file=name) from None
    except (OSError, ValueError, RecursionError) as error:  # as of what looks like a date, or a number, and is none
        raise ConfigError(f"expected readable YAML: {error}", file=name) from None
    if not isinstance(tree, dict):
        raise ConfigError("expected a mapping of sections", file=name, found=tree)
    for override in overrides or []:
        _override(tree, override)
    if out is not None:
        tree["out"] = out
    return parse_config(tree, file=name)


def parse_config(tree: dict[str, Any], file: str = "") -> Config:
    """Check a config given as nested dictionaries. Raises `ConfigError` on the first problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error, tree)
        hint = _close_match(problem.key) if problem.unknown else ""
        raise ConfigError(f"{problem.expected}{hint}", file=file, key=problem.key, found=problem.found) from None


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _where(error: yaml.YAMLError) -> str:
    """What YAML says, on one line, with its place."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError("expected KEY=VALUE", key="--set", found=override)
    node: Any = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError("expected a section to set a key in", key=f"--set {key}", found=node)
    try:
        node[leaf] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise ConfigError("expected a YAML value", key=f"--set {key}", found=text) from None


def _close_match(key: str) -> str:
    section: type[Section] = Config
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = section.section_at(parent)
        if inner is None:
            return ""
        section = inner
    close = difflib.get_close_matches(leaf, list(section.model_fields), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" ({', '.join(section.model_fields)})"
