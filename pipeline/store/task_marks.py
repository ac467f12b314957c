"""Marks of a list of independent tasks, each with its result, so that a restart runs only the ones that are left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.store import ahead, marks, storage
from pipeline.store.fingerprint import Fingerprint


@dataclass(frozen=True)
class TaskMarks:
    """One JSON file per finished task in `folder`; a task's result must be a JSON value.

    `fingerprint` is of everything that decides the results, the list of tasks included; a mark with another one counts
    as none.
    """

    folder: str
    fingerprint: Fingerprint

    def url(self, task: int) -> str:
        """The mark of task number `task`."""
        return storage.join(self.folder, f"{task:05d}.json")

    def invalidate(self, task: int) -> None:
        """Before the files of `task` are replaced: remove its mark if it is of other settings."""
        marks.invalidate(self.url(task), self.fingerprint)

    def invalidate_all(self) -> None:
        """The same for all marks: where other settings divide the files among the tasks in another way."""
        for url in storage.list_files(self.folder, ".json"):
            marks.invalidate(url, self.fingerprint)

    def write(self, task: int, result: Any) -> None:
        """Say that `task` is complete."""
        marks.write_mark(self.url(task), self.fingerprint, {"result": result})

    def finished(self, count: int) -> Iterator[tuple[int, Any]]:
        """Number and result of the tasks below `count` that are complete, in order."""
        there = set(storage.list_files(self.folder, ".json"))
        tasks = [task for task in range(count) if self.url(task) in there]
        for task, mark in zip(tasks, ahead.in_order(self._read, tasks), strict=True):
            if mark is not None and mark["fingerprint"] == self.fingerprint.digest:
                yield task, mark["result"]

    def _read(self, task: int) -> dict[str, Any] | None:
        return marks.read_mark(self.url(task))
