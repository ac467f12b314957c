"""The demonstration data: the same bytes each time, disjoint parts, and exactly the recorded wrong captions."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest

from pipeline.data.demo import _NAMES, DemoPaths, make_demo
from pipeline.data.reader import Sample, read_shard
from pipeline.data.shards import expand
from pipeline.errors import ConfigError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return make_demo(str(tmp_path_factory.mktemp("demo")), seed=3)


def samples(pattern: str) -> list[Sample]:
    return [sample for url in expand(pattern) for sample in read_shard(url)]


def named(caption: str) -> str:
    (name,) = (name for name in _NAMES if re.search(rf"\b{name}\b", caption))
    return name


def test_all_scans_are_there_once_and_readable(demo: DemoPaths) -> None:
    parts = [samples(pattern) for pattern in (demo.train, demo.target, demo.test)]
    assert [len(part) for part in parts] == [1197, 200, 400]
    everything = [sample for part in parts for sample in part]
    assert {sample.status for sample in everything} == {"ok"}
    assert len({sample.uid for sample in everything}) == 1797


def test_truth_is_what_captions_say(demo: DemoPaths) -> None:
    with open(demo.truth, newline="") as handle:
        truth = {row["uid"]: row for row in csv.DictReader(handle)}
    train = samples(demo.train)
    assert set(truth) == {sample.uid for sample in train}
    for sample in train:
        assert named(sample.caption or "") == truth[sample.uid]["caption_class"]
        assert list(sample.meta or {}) == ["uid"]
    wrong = sum(row["clean"] != row["caption_class"] for row in truth.values())
    assert wrong == round(0.3 * 1197)
    assert len({sample.caption for sample in train}) > 60


def test_held_out_captions_are_right(demo: DemoPaths) -> None:
    test = samples(demo.test)
    assert all(named(sample.caption or "") == _NAMES[(sample.meta or {})["label"]] for sample in test)
    assert len({sample.caption for sample in test}) == 10
    from sklearn.datasets import load_digits

    digits = load_digits().target
    assert all(named(sample.caption or "") == _NAMES[digits[int(sample.key)]] for sample in samples(demo.target))


def test_bytes_depend_on_the_seed_alone(demo: DemoPaths, tmp_path: Path) -> None:
    def content(paths: DemoPaths) -> list[bytes]:
        urls = [*expand(paths.train), *expand(paths.target), *expand(paths.test), paths.truth]
        return [Path(url).read_bytes() for url in urls]

    again = make_demo(str(tmp_path / "again"), seed=3)
    assert content(again) == content(demo)
    other = make_demo(str(tmp_path / "again"), seed=4)
    assert content(other) != content(demo)


def test_what_is_there_is_not_written_again(demo: DemoPaths) -> None:
    path = Path(expand(demo.train)[0])
    before = path.stat().st_mtime_ns
    assert make_demo(str(path.parent.parent), seed=3) == demo
    assert path.stat().st_mtime_ns == before


def test_missing_scikit_learn_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"\.\[demo\]"):
        make_demo(str(tmp_path / "none"))
