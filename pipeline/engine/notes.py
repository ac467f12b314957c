"""Warnings for the user: a process keeps them until a result takes them to the driver, which prints each once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.errors import NoteWarning

_kept: list[str] = []


def keep_notes() -> None:
    """From now on keep every `NoteWarning` of this process, and show it as before: in the log of this process."""
    show = warnings.showwarning
    if isinstance(show, _Keeping):
        return
    warnings.showwarning = _Keeping(show)


def take_notes() -> tuple[str, ...]:
    """What was kept since the last call."""
    taken = tuple(_kept)
    del _kept[: len(taken)]
    return taken


class _Keeping:
    """A `warnings.showwarning`."""

    def __init__(self, show: Callable[..., Any]) -> None:
        self._show = show

    def __call__(self, message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, NoteWarning):
            _kept.append(str(message))
        self._show(message, category, *rest, **named)


class Said:
    """The driver's side: says each note once, whichever process it comes from first."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    def hear(self, notes: Iterable[str]) -> None:
        """Say those that are new."""
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                self._say(note)
