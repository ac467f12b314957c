from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.places import locate_members
from pipeline.emit.permutation import Permutation
from pipeline.emit.plan import Input, Plan
from pipeline.emit.reshard import finished, reshard, write_shard
from pipeline.errors import InputError
from pipeline.store import storage
from tests.conftest import Bucket
from tests.emit.made_run import MadeRun, make_run
from tests.helpers import caption_of, image_bytes, sample_members, write_json_shards, write_shards, write_tar
from tests.web import WebServer

Pairs = list[dict[str, Any]]


def plan_of(made: MadeRun, folder: Path | str, **changes: Any) -> Plan:
    inputs = tuple(
        Input(info.index, info.name, info.url, made.folder.keep(info.index), rows, made.run.places(info.index))
        for info in made.inventory
        if (rows := pq.read_metadata(storage.local_path(made.folder.keep(info.index))).num_rows)
    )
    return replace(Plan(str(folder), inputs, 5, None, False, "f1"), **changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def backwards(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
    """A map whose tasks run in another order than their results are wanted in."""
    items = list(items)
    return list(reversed([function(item) for item in reversed(items)]))


def threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
    with ThreadPoolExecutor(3) as pool:
        yield from pool.map(function, items)


@pytest.mark.parametrize("seed", [None, 7])
def test_every_kept_pair_is_there_once_byte_for_byte(tmp_path: Path, seed: int | None) -> None:
    shards = write_shards(tmp_path / "in", shards=3, samples=8)
    made = make_run(tmp_path / "run", shards)
    plan = plan_of(made, tmp_path / "out", seed=seed)
    stats = reshard(plan)
    originals = {name: content for shard in shards for name, content in members_of(Path(shard))}
    written = [member for number in range(3) for member in members_of(tmp_path / "out" / f"{number:05d}.tar")]
    keys = [key for _, _, key, _ in made.kept()]
    assert len(keys) == 12
    assert sorted(written) == sorted((name, originals[name]) for name in originals if name[:8] in keys)
    order = list(dict.fromkeys(name[:8] for name, _ in written))
    assert (order == keys) is (seed is None)
    assert sorted(order) == sorted(keys)
    assert [entry.successes for entry in stats] == [4, 4, 4]
    assert not [name for name in files_of(tmp_path / "out") if name.startswith(storage.TEMPORARY_PREFIX)]


def test_systems_that_take_no_advice_on_reading_are_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=2))
    monkeypatch.delattr(os, "posix_fadvise")
    assert sum(stats.successes for stats in reshard(plan_of(made, tmp_path / "out"))) == len(made.kept())


def test_sizes_are_near_equal_numbers_contiguous_and_stats_and_sizes_agree(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=3, samples=9), keep=17 / 27)
    reshard(plan_of(made, tmp_path / "out"))
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert sizes == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 4, "00003.tar": 5}
    for name, size in sizes.items():
        stem = tmp_path / "out" / name.removesuffix(".tar")
        assert json.loads(Path(f"{stem}_stats.json").read_text())["successes"] == size
        assert len({member.partition(".")[0] for member, _ in members_of(Path(f"{stem}.tar"))}) == size
        assert pq.read_metadata(f"{stem}.parquet").num_rows == size


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_bytes_do_not_depend_on_the_workers_or_how_the_input_is_stored(
    tmp_path: Path, seed: int | None, suffix: str
) -> None:
    plain = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=3))
    reshard(plan_of(plain, tmp_path / "plain", seed=seed))
    # The same pairs: keys and uids come from the samples, so the same ones are kept.
    stored = make_run(tmp_path / "run2", write_shards(tmp_path / "in2", shards=3, suffix=suffix))
    for number, map_tasks in enumerate((backwards, threads)):
        out = tmp_path / f"out{number}"
        reshard(plan_of(stored, out, seed=seed), map_tasks)
        assert {name: content for name, content in files_of(out).items() if name.endswith(".tar")} == {
            name: content for name, content in files_of(tmp_path / "plain").items() if name.endswith(".tar")
        }
    assert files_of(tmp_path / "out0") == files_of(tmp_path / "out1")


@pytest.mark.parametrize("seed", [None, 3])
def test_inputs_may_be_stored_in_several_ways(tmp_path: Path, seed: int | None) -> None:
    """A name beyond ASCII, or a compressed shard, sends a sample another way than its neighbours."""
    plain = write_shards(tmp_path / "in", shards=3)
    reshard(plan_of(make_run(tmp_path / "run", plain), tmp_path / "plain", seed=seed))
    mixed = list(plain)
    mixed[1] = write_shards(tmp_path / "in2", shards=3, suffix=".tar.gz")[1]
    with tarfile.open(mixed[2], "a") as tar:
        tar.addfile(tarfile.TarInfo("__é__"))
    reshard(plan_of(make_run(tmp_path / "run2", mixed), tmp_path / "mixed", seed=seed))
    names = [f"{number:05d}.tar" for number in range(3)]
    wanted, found = files_of(tmp_path / "plain"), files_of(tmp_path / "mixed")
    assert [found[name] for name in names if name in wanted] == [wanted[name] for name in names if name in wanted]


def test_the_source_of_each_pair_is_recorded(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in"))
    reshard(plan_of(made, tmp_path / "out", seed=1, suffix_keys=True))
    kept = {uid: (shard, key, index) for shard, uid, key, index in made.kept()}
    rows = [row for number in range(2) for row in pq.read_table(tmp_path / "out" / f"{number:05d}.parquet").to_pylist()]
    assert len(rows) == len(kept)
    for row in rows:
        shard, key, index = kept[row["uid"]]
        assert row["source_url"] == made.inventory[shard].url
        assert (row["source_key"], row["source_index"]) == (key, index)
        assert row["key"] == f"{key}-{shard:05d}"


@pytest.mark.parametrize("seed", [None, 5])
def test_keys_that_repeat_get_the_number_of_their_input_shard(tmp_path: Path, seed: int | None) -> None:
    shards = [
        write_tar(tmp_path / f"{shard}.tar", [m for n in range(4) for m in sample_members(f"{n}", b"x", f"{shard}{n}")])
        for shard in range(3)
    ]
    made = make_run(tmp_path / "run", shards, keep=1.0)
    reshard(plan_of(made, tmp_path / "out", pairs_per_shard=12, suffix_keys=True, seed=seed))
    written = members_of(tmp_path / "out" / "00000.tar")
    captions = {name: content for name, content in written if name.endswith("txt")}
    assert captions == {f"{n}-{shard:05d}.txt": f"{shard}{n}".encode() for shard in range(3) for n in range(4)}
    added = {name: json.loads(content)["uid"] for name, content in written if name.endswith("json")}
    assert added == {f"{key}-{shard:05d}.json": uid for shard, uid, key, _ in made.kept()}


@pytest.mark.parametrize("seed", [None, 5])
def test_a_name_that_gets_too_long_for_one_header_has_two(tmp_path: Path, seed: int | None) -> None:
    key = "n" * 92
    shards = [write_tar(tmp_path / f"{n}.tar", sample_members(key, b"x", f"caption {n}")) for n in range(2)]
    made = make_run(tmp_path / "run", shards, keep=1.0)
    reshard(plan_of(made, tmp_path / "out", suffix_keys=True, seed=seed))
    names = [name for name, _ in members_of(tmp_path / "out" / "00000.tar")]
    assert sorted(names) == [f"{key}-{n:05d}.{ending}" for n in range(2) for ending in ("jpg", "json", "txt")]


def test_a_json_with_the_uid_is_added_where_there_is_none_and_no_json_is_changed(tmp_path: Path) -> None:
    uid = hashlib.blake2b(b"z", digest_size=16).hexdigest()
    members = [
        *sample_members("none", b"x", "a"),
        *sample_members("own", b"x", "b", {"uid": uid}),
        *sample_members("other", b"x", "c", b'{ "url":  "u" }'),
    ]
    made = make_run(tmp_path / "run", [write_tar(tmp_path / "a.tar", members)], keep=1.0)
    (stats,) = reshard(plan_of(made, tmp_path / "out"))
    jsons = {name: content for name, content in members_of(tmp_path / "out" / "00000.tar") if name.endswith("json")}
    derived = hashlib.blake2b(b"a.tar/none", digest_size=16).hexdigest()
    assert json.loads(jsons["none.json"]) == {"uid": derived}
    assert json.loads(jsons["own.json"]) == {"uid": uid}
    assert jsons["other.json"] == b'{ "url":  "u" }'
    assert (stats.json_added, stats.json_without_uid) == (1, 1)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("txt", [None, "other text"])
def test_the_caption_that_was_scored_becomes_the_txt(tmp_path: Path, seed: int | None, txt: str | None) -> None:
    shards = write_json_shards(tmp_path / "in", txt=txt)
    shards.append(write_tar(tmp_path / "in" / "00002.tar.gz", [
        *sample_members("00000016", image_bytes(), None, {"caption": caption_of(16)}),
        ("00000017.jpg", image_bytes()), ("00000017.TXT", b"old"),
        ("00000017.json", json.dumps({"caption": caption_of(17)}).encode()),
    ]))  # fmt: skip
    made = make_run(tmp_path / "run", shards, keep=1.0, data={"caption": "json:caption"})
    plan = plan_of(made, tmp_path / "out", seed=seed, pairs_per_shard=99, caption="json:caption")
    (stats,) = reshard(plan)
    assert stats.successes == 18
    members = members_of(tmp_path / "out" / "00000.tar")
    texts = {name[:8]: content.decode() for name, content in members if name.lower().endswith(".txt")}
    assert texts == {f"{number:08d}": caption_of(number) for number in range(18)}
    originals = {member for shard in shards for member in members_of(Path(shard))}
    rest = [member for member in members if not member[0].lower().endswith(".txt")]
    assert len(rest) == 36
    assert set(rest) <= originals


def test_a_second_call_writes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=3))
    plan = plan_of(made, tmp_path / "out", seed=2)
    stats = reshard(plan)
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "00001_stats.json").unlink()
    (tmp_path / "out" / "00002.tar").write_bytes(b"cut")
    whole = {number: (tmp_path / "out" / f"{number:05d}.tar").stat().st_mtime_ns for number in range(3)}
    assert reshard(plan) == stats
    assert files_of(tmp_path / "out") == before
    again = {number: (tmp_path / "out" / f"{number:05d}.tar").stat().st_mtime_ns for number in range(3)}
    assert [again[number] == whole[number] for number in range(3)] == [True, False, False]
    reads: list[str] = []
    monkeypatch.setattr("pipeline.emit.shuffle.prepare", lambda plan, number: reads.append(number))
    assert reshard(plan) == stats
    assert reads == []


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=3, suffix=".tar.gz"))
    plan = plan_of(made, tmp_path / "out", seed=2)

    def fails_at(number: int) -> Callable[..., Iterable[Any]]:
        def map_some(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
            for item in items:
                if function.func is write_shard and item == number:  # type: ignore[attr-defined]
                    raise KeyboardInterrupt
                yield function(item)

        return map_some

    with pytest.raises(KeyboardInterrupt):
        reshard(plan, fails_at(1))
    assert not Path(plan.sizes).exists()
    assert [finished(plan, shard) is not None for shard in range(3)] == [True, False, False]
    reshard(plan)
    reshard(replace(plan, folder=str(tmp_path / "whole")))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_another_plan_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=3))
    reshard(plan_of(made, tmp_path / "out", pairs_per_shard=2))
    reshard(plan_of(made, tmp_path / "out", fingerprint="f2"))
    reshard(plan_of(made, tmp_path / "alone", fingerprint="f2"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_a_shard_that_changed_since_it_was_scored_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", shards=1)
    made = make_run(tmp_path / "run", shards)
    key, index = made.kept()[0][2:]
    write_tar(shards[0], [m for n in range(8) for m in sample_members(f"other{n}", b"x", "c")])
    for seed in (None, 1):
        with (
            pytest.raises(InputError, match=f"00000.tar: sample.*{key}.*other{index}")
            if not seed
            else pytest.raises(InputError, match="changed since it was scored")
        ):
            reshard(plan_of(made, tmp_path / f"out{seed}", seed=seed))
    write_tar(shards[0], [])
    with pytest.raises(InputError, match="expected a sample number"):
        reshard(plan_of(made, tmp_path / "out", seed=None))


@pytest.mark.parametrize("seed", [None, 4])
def test_a_tar_is_walked_only_if_it_is_another_than_the_inventory_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    shards = write_shards(tmp_path / "in", shards=3)
    made = make_run(tmp_path / "run", shards)
    walked: list[str] = []

    def locate(url: str) -> Any:
        walked.append(url)
        return locate_members(url)

    monkeypatch.setattr("pipeline.emit.blocks.locate_members", locate)
    reshard(plan_of(made, tmp_path / "known", seed=seed, pairs_per_shard=99))
    assert walked == []
    os.utime(shards[1], (1, 1))
    reshard(plan_of(made, tmp_path / "walked", seed=seed, pairs_per_shard=99))
    assert walked == [shards[1]]
    assert files_of(tmp_path / "walked") == files_of(tmp_path / "known")


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=5))
    reshard(plan_of(made, tmp_path / "out", seed=1))
    monkeypatch.setattr("pipeline.emit.files.OPEN_FILES", 2)
    reshard(plan_of(made, tmp_path / "few", seed=1))
    assert files_of(tmp_path / "few") == files_of(tmp_path / "out")


@pytest.mark.parametrize("seed", [None, 4])
def test_from_and_to_an_object_store(tmp_path: Path, s3_bucket: Bucket, seed: int | None) -> None:
    shards = write_shards(tmp_path / "in", shards=2)
    made = make_run(tmp_path / "run", shards)
    reshard(plan_of(made, tmp_path / "out", seed=seed))
    remote = s3_bucket.put(*shards)
    plan = plan_of(made, f"{s3_bucket.url}/out", seed=seed)
    plan = replace(plan, inputs=tuple(replace(item, url=remote[item.number]) for item in plan.inputs))
    reshard(plan)
    names = [storage.basename(url) for url in storage.list_files(plan.folder)]
    assert names == list(files_of(tmp_path / "out"))
    for name in names:
        if not name.endswith(".parquet"):
            assert storage.read_bytes(f"{plan.folder}/{name}") == (tmp_path / "out" / name).read_bytes()
    assert not storage.exists(plan.parts)


@pytest.mark.parametrize("seed", [None, 4])
def test_from_a_web_server(tmp_path: Path, seed: int | None) -> None:
    shards = write_shards(tmp_path / "in", shards=2)
    made = make_run(tmp_path / "run", shards)
    reshard(plan_of(made, tmp_path / "local", seed=seed))
    with WebServer(tmp_path / "in") as web:
        remote = make_run(tmp_path / "run2", [f"{web.url}/{Path(shard).name}" for shard in shards])
        assert remote.kept() == made.kept()
        reshard(plan_of(remote, tmp_path / "web", seed=seed))
    local, found = files_of(tmp_path / "local"), files_of(tmp_path / "web")
    assert list(found) == list(local)
    assert all(found[name] == local[name] for name in local if not name.endswith(".parquet"))


@given(st.integers(1, 3000), st.integers(-(2**70), 2**70))
@settings(deadline=None)
def test_a_permutation_is_one_to_one_and_inverts(size: int, seed: int) -> None:
    permutation = Permutation(size, seed)
    places = permutation.place(np.arange(size))
    assert sorted(places) == list(range(size))
    assert (permutation.number(places) == np.arange(size)).all()
    assert (permutation.place(np.array([size - 1])) == places[-1]).all()


def test_a_permutation_looks_random() -> None:
    """Neighbours land independently: correlations stay below four standard errors, seeds differ."""
    size = 40_000
    places = Permutation(size, 0).place(np.arange(size))
    bound = 4 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < bound
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < bound
    assert (places == Permutation(size, 1).place(np.arange(size))).sum() < 20


def test_a_tar_of_another_plan_that_broke_off_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", shards=3))
    plan = plan_of(made, tmp_path / "out", pairs_per_shard=99)
    reshard(plan)
    before = files_of(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.emit.reshard.pq.write_table", _killed)
        with pytest.raises(OSError, match="killed"):
            reshard(replace(plan, seed=3, fingerprint="f2"))
    assert files_of(tmp_path / "out")["00000.tar"] != before["00000.tar"]
    assert len(files_of(tmp_path / "out")["00000.tar"]) == len(before["00000.tar"])
    reshard(plan)
    assert files_of(tmp_path / "out")["00000.tar"] == before["00000.tar"]


def _killed(*_: object, **__: object) -> None:
    raise OSError("killed")
