"""Why something failed, in plain values and in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.engine.failures import (
    TRACEBACK_CHARACTERS,
    Aside,
    Failure,
    SampleError,
    check_writable,
    read_aside,
    set_aside,
)
from pipeline.errors import StageError
from pipeline.store import storage


def test_a_failure_names_the_cause_the_sample_and_the_end_of_the_traceback() -> None:
    try:
        try:
            raise OSError("the tar\nis torn " + "x" * TRACEBACK_CHARACTERS)
        except OSError as cause:
            raise SampleError("000007") from cause
    except SampleError as error:
        failure = Failure.of(error, worker="3")
    assert (failure.exception, failure.last_sample, failure.worker) == ("OSError", "000007", "3")
    assert failure.message.startswith("the tar is torn")
    assert len(failure.traceback) == TRACEBACK_CHARACTERS
    assert failure.traceback.rstrip().endswith("SampleError: 000007")
    assert str(failure).endswith("(sample 000007)")
    assert str(Failure("OSError", "gone")) == "OSError: gone"


def test_what_is_set_aside_is_read_back_and_a_broken_file_is_none(tmp_path: Path) -> None:
    url = str(tmp_path / "failed" / "00003.json")
    aside = Aside(3, "00003.tar", Failure("OSError", "torn", "trace", "k", "host", "w"), 4, 2, "digest", 12.5)
    set_aside(url, aside)
    assert read_aside(url) == aside
    Path(url).write_text("{")
    assert read_aside(url) is None
    assert read_aside(str(tmp_path / "other.json")) is None


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = str(tmp_path / "file" / "run")
    with pytest.raises(StageError, match=r"run: expected a folder that can be written to, found: \S") as refused:
        check_writable(folder)
    aside = Aside(3, "00003.tar", Failure("OSError", "torn"), 4)
    with pytest.raises(StageError, match=r"cannot be written: .*; 00003.tar: OSError: torn is lost") as lost:
        set_aside(f"{folder}/00003.json", aside)
    assert "\n" not in str(refused.value) + str(lost.value)


def test_a_driver_that_is_killed_while_it_tries_to_write_leaves_what_the_next_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", lambda url: None)
        patch.setattr(os, "getpid", lambda: 1)
        check_writable(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    check_writable(str(tmp_path))
    assert not list(tmp_path.iterdir())
