"""What is wrong with a config, from pydantic's errors: the key, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

#: Characters of a section up to which it is shown.
_SHOWN = 80


@dataclass(frozen=True)
class Problem:
    """The dotted key, what was expected there (begins with `expected`), and what was found; None where nothing was.

    `unknown`: there is no such key.
    """

    key: str
    expected: str
    found: Any
    unknown: bool = False


def first_problem(error: ValidationError, given: Mapping[str, Any]) -> Problem:
    """The problem that a message is best about, of those that checking the tree `given` has found.

    A key that is needed may be missing because it is misspelt: unknown ones are named first.
    """
    problem = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    kind, key = problem["type"], _key(problem["loc"], given, kind=problem["type"])
    if kind == "extra_forbidden":
        return Problem(key, "expected a known key", None, unknown=True)
    if kind == "missing":
        return Problem(key, "expected a value, this key is needed", None)
    if kind == "model_type":
        return Problem(key, "expected a section, a mapping of its keys", problem["input"])
    expected = problem["msg"].removeprefix("Value error, ").replace("Input should be ", "expected ")
    if not expected.startswith("expected"):
        expected = f"expected {expected[0].lower()}{expected[1:]}"
    found = problem["input"]
    if kind == "value_error" and isinstance(found, Mapping) and len(str(found)) > _SHOWN:
        found = None  # what is wrong between its keys is said in words, which the whole section would drown
    return Problem(key, expected, found)


def _key(location: tuple[int | str, ...], given: Any, *, kind: str) -> str:
    """The parts of a location that are keys or places of the tree; others name types that a value may have."""
    parts = []
    for place, part in enumerate(location):
        missing = kind == "missing" and place == len(location) - 1
        inside = part in given if isinstance(given, Mapping) else isinstance(given, list) and isinstance(part, int)
        if inside or missing:
            parts.append(str(part))
            given = None if missing else given[part]
    return ".".join(parts)
