from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from pipeline.emit.emit import emit
from pipeline.errors import InputError, StageError
from pipeline.loader import KeptPairs, keep_only, kept_shards
from tests.emit.made_run import MadeRun, make_run
from tests.helpers import caption_of, sample_members, write_json_shards, write_shards, write_tar


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A selection of four plain shards, handed over without tars."""
    folder = tmp_path_factory.mktemp("loader")
    made = make_run(folder / "run", write_shards(folder / "in", shards=4, samples=10), keep=0.4)
    emit(made.run, made.config, made.inventory)
    return made


def kept_pipeline(folder: str, urls: list[str] | None = None) -> webdataset.DataPipeline:
    return webdataset.DataPipeline(
        webdataset.SimpleShardList(urls or kept_shards(folder)),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        keep_only(folder),
        webdataset.map(lambda sample: sample["__key__"]),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stage_passes_each_kept_pair_once_over_all_workers(made: MadeRun, workers: int) -> None:
    loader = DataLoader(kept_pipeline(made.folder.root), batch_size=None, num_workers=workers)
    keys = [key for _, _, key, _ in made.kept()]
    found = list(loader)
    assert sorted(found) == sorted(keys)
    assert len(found) == 16
    if not workers:
        assert found == keys


def test_the_stage_passes_each_kept_pair_once_over_all_nodes(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        part = list(kept_pipeline(made.folder.root))
        assert 0 < len(part) < 16
        found += part
    assert sorted(found) == sorted(key for _, _, key, _ in made.kept())


def test_a_shard_twice_in_a_row_is_passed_twice(made: MadeRun) -> None:
    url = kept_shards(made.folder.root)[0]
    once = list(kept_pipeline(made.folder.root, [url]))
    assert once
    assert list(kept_pipeline(made.folder.root, [url, url])) == once + once


def test_a_shard_the_selection_does_not_know_is_named(made: MadeRun, tmp_path: Path) -> None:
    other = write_tar(tmp_path / "other.tar", sample_members("a", b"x", "c"))
    with pytest.raises(InputError, match=r"other\.tar: expected a shard of .*manifest\.jsonl"):
        list(kept_pipeline(made.folder.root, [other]))


def test_of_a_key_that_repeats_only_the_scored_one_is_kept(tmp_path: Path) -> None:
    members = [m for key in ("a", "b", "a", "c") for m in sample_members(key, b"x", f"caption {key}")]
    made = make_run(tmp_path / "run", [write_tar(tmp_path / "0.tar", members)], keep=1.0)
    emit(made.run, made.config, made.inventory)
    assert list(kept_pipeline(made.folder.root)) == ["a", "b", "c"]
    assert [item["__key__"] for item in KeptPairs(made.folder.root)] == ["a", "b", "c"]


def test_before_anything_was_emitted_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="diffprune emit"):
        keep_only(str(tmp_path))
    with pytest.raises(StageError, match="diffprune emit"):
        KeptPairs(str(tmp_path))


def caption_of_item(item: dict[str, Any]) -> tuple[str, str]:
    return item["uid"], item["txt"].decode()


def test_pairs_by_number_are_the_kept_ones_in_input_order(made: MadeRun) -> None:
    pairs = KeptPairs(made.folder.root)
    kept = made.kept()
    assert len(pairs) == len(kept) == 16
    originals = {
        sample["__key__"]: sample
        for info in made.inventory
        for sample in webdataset.WebDataset(info.url, shardshuffle=False)
    }
    for number, (shard, uid, key, _) in enumerate(kept):
        item = pairs[number]
        assert (item["__key__"], item["uid"]) == (key, uid)
        assert item["__url__"] == made.inventory[shard].url
        assert {name: item[name] for name in ("jpg", "txt", "json")} == {
            name: originals[key][name] for name in ("jpg", "txt", "json")
        }
    assert pairs[-1] == pairs[15]
    for beyond in (16, -17):
        with pytest.raises(IndexError):
            pairs[beyond]


def test_pairs_by_number_are_found_without_walking_a_shard_that_the_inventory_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in"), select={"keep": 0.5, "name": "half"})
    emit(made.run, made.config, made.inventory)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.loader.read_places", lambda *_: None)
        walked = [KeptPairs(made.folder.root)[number] for number in range(8)]
    monkeypatch.setattr("pipeline.loader.locate_samples", None)
    assert [KeptPairs(made.folder.root + "/")[number] for number in range(8)] == walked


def test_pairs_by_number_work_in_workers_and_shuffled(made: MadeRun) -> None:
    pairs = KeptPairs(made.folder.root, caption_of_item)
    expected = sorted(pairs[number] for number in range(16))
    again: KeptPairs = pickle.loads(pickle.dumps(pairs))
    assert sorted(again[number] for number in range(16)) == expected
    loader = DataLoader(pairs, batch_size=None, num_workers=2, shuffle=True, generator=torch.Generator().manual_seed(1))
    found = [tuple(item) for item in loader]
    assert sorted(found) == expected
    assert found != [pairs[number] for number in range(16)]


def test_pairs_by_number_refuse_what_cannot_be_mapped(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in", suffix=".tar.gz"))
    emit(made.run, made.config, made.inventory)
    with pytest.raises(InputError, match=r"00000\.tar\.gz: expected an uncompressed local tar.*keep_only"):
        KeptPairs(made.folder.root)
    assert sorted(kept_pipeline(made.folder.root)) == sorted(key for _, _, key, _ in made.kept())


def test_a_shard_that_changed_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", shards=1)
    made = make_run(tmp_path / "run", shards)
    emit(made.run, made.config, made.inventory)
    write_tar(shards[0], [m for n in range(8) for m in sample_members(f"other{n}", b"x", "c")])
    with pytest.raises(InputError, match="the shard has changed"):
        KeptPairs(made.folder.root)[0]


@pytest.mark.parametrize("txt", [None, "other text"])
def test_pairs_come_with_the_caption_that_they_were_scored_with(tmp_path: Path, txt: str | None) -> None:
    """Whether open_clip's filter would find no caption otherwise, or another one."""
    from pipeline.models import compat  # noqa: F401  isort: skip
    from open_clip_train.data import filter_no_caption_or_no_image

    made = make_run(tmp_path / "run", write_json_shards(tmp_path / "in", txt=txt), data={"caption": "json:caption"})
    emit(made.run, made.config, made.inventory)
    stage = webdataset.DataPipeline(
        webdataset.SimpleShardList(kept_shards(made.folder.root)),
        webdataset.tarfile_to_samples(),
        keep_only(made.folder.root),
        webdataset.select(filter_no_caption_or_no_image),
    )
    expected = [(key, caption_of(int(key))) for _, _, key, _ in made.kept()]
    assert len(expected) == 8
    for samples in (list(stage), list(KeptPairs(made.folder.root))):
        assert [(sample["__key__"], sample["txt"].decode()) for sample in samples] == expected


def test_a_caption_that_is_gone_is_named(tmp_path: Path) -> None:
    shards = write_json_shards(tmp_path / "in", shards=1)
    made = make_run(tmp_path / "run", shards, data={"caption": "json:caption"})
    emit(made.run, made.config, made.inventory)
    write_tar(shards[0], [m for n in range(8) for m in sample_members(f"{n:08d}", b"x", None, {"caption": 3})])
    with pytest.raises(InputError, match=r"00000\.tar: sample .*json key 'caption'; the shard has changed"):
        list(kept_pipeline(made.folder.root))
    with pytest.raises(InputError, match=r"00000\.tar: sample .*json key 'caption'; the shard has changed"):
        KeptPairs(made.folder.root)[0]


def test_an_unfinished_hand_over_is_refused(tmp_path: Path) -> None:
    """What says where captions are is written last."""
    made = make_run(tmp_path / "run", write_shards(tmp_path / "in"))
    emit(made.run, made.config, made.inventory)
    Path(made.folder.mark).unlink()
    for opened in (keep_only, KeptPairs):
        with pytest.raises(StageError, match=r"emit\.json: expected an emitted selection"):
            opened(made.folder.root)
