"""Notes of a process travel with its results and are said once; other warnings stay in its log."""

from __future__ import annotations

import warnings

from pipeline.engine.notes import Said, keep_notes, take_notes
from pipeline.engine.tasks import _call, _Done
from pipeline.errors import NoteWarning


def compute(item: int) -> int:
    warnings.warn(f"{item} is slow", NoteWarning, stacklevel=1)
    warnings.warn("torch is torch", UserWarning, stacklevel=1)
    return item


def test_a_task_brings_its_notes_and_no_other_warnings() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        keep_notes()
        assert _call(compute, 1, 0, None) == _Done(1, ("1 is slow",))
        assert _call(compute, 2, 0, None) == _Done(2, ("2 is slow",))
    assert take_notes() == ()
    assert [str(each.message) for each in shown] == ["1 is slow", "torch is torch", "2 is slow", "torch is torch"]


def test_the_driver_says_a_note_once() -> None:
    said: list[str] = []
    notes = Said(said.append)
    for heard in (("a", "b"), (), ("b", "c"), ("a",)):
        notes.hear(heard)
    assert said == ["a", "b", "c"]
