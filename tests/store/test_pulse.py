"""Signs of life: news while there are any, and silence where storage fails."""

from __future__ import annotations

from pathlib import Path

from pipeline.store.pulse import Pulse, read_pulse


def test_what_is_told_is_read_until_it_ends(tmp_path: Path) -> None:
    url = str(tmp_path / "progress.json")
    pulse = Pulse(url)
    pulse.beat({"step": 1})
    pulse.beat({"step": 2})
    assert read_pulse(url) == {"step": 1}, "the last one is not old enough"
    pulse.beat({"step": 3}, now=True)
    assert read_pulse(url) == {"step": 3}
    pulse.end()
    assert read_pulse(url) is None


def test_storage_that_fails_ends_no_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    pulse = Pulse(str(tmp_path / "file" / "progress.json"))
    pulse.beat({"step": 1})
    pulse.end()
