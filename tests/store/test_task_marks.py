"""A restart runs only the tasks that have no mark of the same settings."""

from __future__ import annotations

from pathlib import Path

from pipeline.store import storage
from pipeline.store.fingerprint import Fingerprint
from pipeline.store.task_marks import TaskMarks


def test_finished_tasks_come_back_in_order_with_their_results(tmp_path: Path) -> None:
    marks = TaskMarks(str(tmp_path), Fingerprint({"tasks": 400}))
    for task in (399, 2, 300, 0):
        marks.write(task, {"sum": task / 2})
    (tmp_path / "00001.json").write_text("no mark")
    assert list(marks.finished(400)) == [(task, {"sum": task / 2}) for task in (0, 2, 300, 399)]
    assert [task for task, _ in marks.finished(300)] == [0, 2]
    assert list(TaskMarks(str(tmp_path / "absent"), marks.fingerprint).finished(5)) == []


def test_more_tasks_than_are_read_at_once(tmp_path: Path) -> None:
    marks = TaskMarks(str(tmp_path), Fingerprint({}))
    for task in range(300):
        storage.write_json(marks.url(task), {"result": task, "fingerprint": marks.fingerprint.digest, "parts": {}})
    assert list(marks.finished(300)) == [(task, task) for task in range(300)]


def test_marks_of_other_settings_count_as_none(tmp_path: Path) -> None:
    TaskMarks(str(tmp_path), Fingerprint({"steps": 1})).write(0, "old")
    marks = TaskMarks(str(tmp_path), Fingerprint({"steps": 2}))
    assert list(marks.finished(1)) == []
    marks.write(0, "new")
    assert list(marks.finished(1)) == [(0, "new")]


def test_only_marks_of_other_settings_are_removed_before_files_are_replaced(tmp_path: Path) -> None:
    old, new = (TaskMarks(str(tmp_path), Fingerprint({"steps": steps})) for steps in (1, 2))
    for task in (0, 1, 7):
        old.write(task, "old")
    new.write(2, "new")
    for task in (0, 2, 3):
        new.invalidate(task)
    assert [number for number, _ in old.finished(9)] == [1, 7]
    new.invalidate_all()
    assert list(old.finished(9)) == []
    assert list(new.finished(9)) == [(2, "new")]
