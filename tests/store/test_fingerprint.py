"""Fingerprints: equal for equal values, and differences named."""

from __future__ import annotations

import pytest

from pipeline.errors import FingerprintError
from pipeline.store import marks, storage
from pipeline.store.fingerprint import Fingerprint

PARTS = {"checkpoints": ["aa", "bb"], "score": {"estimator": "diff-in", "settings": {"loss": "row"}}, "seed": 0}


def changed(**parts: object) -> Fingerprint:
    return Fingerprint({**PARTS, **parts})


def test_digest_ignores_the_order_of_keys_but_no_value() -> None:
    reordered = Fingerprint(dict(reversed(PARTS.items())))
    assert reordered.digest == Fingerprint(PARTS).digest
    others = [
        changed(seed=1),
        changed(checkpoints=["bb", "aa"]),
        changed(checkpoints=["aa"]),
        changed(score={"estimator": "diff-in", "settings": {}}),
        Fingerprint(PARTS).of_shard("a.tar", 1, "x"),
        Fingerprint(PARTS).of_shard("a.tar", 2, "x"),
        Fingerprint(PARTS).of_shard("a.tar", 1, "y"),
        Fingerprint(PARTS).of_shard("b.tar", 1, "x"),
    ]
    assert len({Fingerprint(PARTS).digest, *(other.digest for other in others)}) == 9


def test_differences_name_each_value_that_changed() -> None:
    now = changed(checkpoints=["aa", "cc", "dd"], score={"estimator": "tracin", "settings": {"loss": "row"}})
    assert now.differences(PARTS) == [
        'checkpoints[1]: "bb" there, "cc" now',
        'checkpoints[2]: nothing there, "dd" now',
        'score.estimator: "diff-in" there, "tracin" now',
    ]
    assert changed(checkpoints=["aa"]).differences(PARTS) == ['checkpoints[1]: "bb" there, nothing now']
    assert Fingerprint(PARTS).differences(PARTS) == []


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({}, "(its values are not recorded)"),
        (
            {"seed": 1, "a": 1, "b": 2, "c": 3},
            "(a: 1 there, nothing now; b: 2 there, nothing now; c: 3 there, nothing now):",
        ),
        ({"a": 1, "b": 2, "c": 3}, "c: 3 there, nothing now; and 1 more)"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "c: 3 there, nothing now; and 2 more)"),
        ("no parts", "(its values are not recorded)"),
        ({"seed": 1}, "(its values are not recorded)"),
    ],
)
def test_a_refusal_names_some_differences_and_counts_the_others(there: object, named: str) -> None:
    with pytest.raises(FingerprintError) as refused:
        marks.is_current("mark.json", {"fingerprint": "other", "parts": there}, Fingerprint({"seed": 1}), "refuse")
    assert named in str(refused.value)


def test_a_stale_mark_is_refused_or_redone(tmp_path: object) -> None:
    url = f"{tmp_path}/mark.json"
    assert not marks.is_current(url, marks.read_mark(url), Fingerprint(PARTS), "refuse")
    marks.write_mark(url, Fingerprint(PARTS), {"rows": 3})
    mark = marks.read_mark(url)
    assert mark is not None
    assert mark["rows"] == 3
    assert marks.is_current(url, mark, Fingerprint(PARTS), "refuse")
    assert not marks.is_current(url, mark, changed(seed=1), "redo")
    with pytest.raises(FingerprintError, match=r"mark\.json was made with other settings \(seed: 0 there, 1 now\)"):
        marks.is_current(url, mark, changed(seed=1), "refuse")


def test_text_that_is_no_mark_counts_as_none(tmp_path: object) -> None:
    url = f"{tmp_path}/mark.json"
    for text in (b"", b"{", b"[]", b'{"rows": 1}', b"\xff"):
        storage.write_bytes(url, text)
        assert marks.read_mark(url) is None
