"""Which members of a tar form a sample: webdataset's rule, for all that reads shards or writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_HIDDEN = re.compile(r"__[^/]*__(?:$|/)")


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key (up to the first dot, folder included) and the rest after that dot.

    None for members that belong to no sample: those without a key, or with a hidden name, or one that no file and no
    header of a tar can have.
    """
    if "\0" in name:
        return None
    key, dot, ending = name.partition(".")
    if "/" in name or not (key and dot) or name[:2] == "__":
        match = _NAME.fullmatch(name)
        return None if match is None or _HIDDEN.match(name) else (match[1], match[2])
    return key, ending


def group(
    members: Iterable[tuple[str, T]], take: Callable[[int, T], Any] | None = None
) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Samples in order: a key and the members (what follows it in their names, dot and all) that follow each other
    with it, none of whose endings repeats.

    What `take` makes of a member and the number of its sample, before the next member is asked for, replaces it.
    """
    key, number = "", 0
    mine: list[tuple[str, Any]] = []
    endings: set[str] = set()
    for name, value in members:
        parts = split_name(name)
        if parts is None:
            continue
        new_key, ending = parts[0], parts[1].lower()
        if new_key != key or ending in endings:
            if mine:
                yield key, mine
                number += 1
            key, mine, endings = new_key, [], set()
        endings.add(ending)
        mine.append((name[len(new_key) :], value if take is None else take(number, value)))
    if mine:
        yield key, mine
