"""Seeded draws from all shards, and the cache of decoded pairs."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.data.cache as cache_module
from pipeline.config import parse_config
from pipeline.data.cache import PairCache, build_cache, open_cache
from pipeline.data.decode import Decoder, ImageSpec, caption_id
from pipeline.data.inventory import ShardInfo, inspect_shard, write_inventory
from pipeline.data.positions import draw_positions
from pipeline.data.reader import read_shard
from pipeline.data.samples import Places, samples_at
from pipeline.data.sampling import load_pairs
from pipeline.errors import InputError
from pipeline.stages.computing import ComputingJob
from pipeline.stages.plans import draw_batches
from pipeline.types import PairBatch
from tests.conftest import Bucket
from tests.helpers import ByteTokenizer, Member, image_bytes, sample_members, write_tar
from tests.web import WebServer

SPEC = ImageSpec((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def make_decoder(size: int = 16) -> Decoder:
    return Decoder(ImageSpec((size, size), SPEC.mean, SPEC.std), ByteTokenizer(), 10_000)


@pytest.fixture
def inventory(tmp_path: Path) -> list[ShardInfo]:
    """Three shards of 5, 0 and 7 samples; those at positions 2 and 9 are bad."""
    paths = []
    position = 0
    for number, samples in enumerate((5, 0, 7)):
        members = []
        for _ in range(samples):
            image = b"bad" if position in (2, 9) else image_bytes((20, 20), seed=position)
            members += sample_members(f"{position:03d}", image, f"number {position}")
            position += 1
        paths.append(write_tar(tmp_path / f"{number}.tar", members))
    return [inspect_shard(index, path) for index, path in enumerate(paths)]


def everything(inventory: list[ShardInfo]) -> PairBatch:
    return PairBatch.cat([make_decoder().decode_shard(read_shard(info.url)).batch for info in inventory])


def same(one: PairBatch, other: PairBatch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in one.__slots__)


def test_draws_are_seeded_different_and_spare_the_excluded() -> None:
    drawn = draw_positions(1000, 300, seed=1)
    assert np.array_equal(drawn, draw_positions(1000, 300, seed=1))
    assert not np.array_equal(drawn, draw_positions(1000, 300, seed=2))
    assert len(set(drawn.tolist())) == 300
    assert not np.array_equal(drawn, np.sort(drawn))
    others = draw_positions(1000, 5000, seed=3, exclude=drawn)
    assert sorted(others.tolist()) == sorted(set(range(1000)) - set(drawn.tolist()))


def test_draws_are_uniform_over_what_is_not_excluded() -> None:
    exclude = np.array([0, 1, 5, 9, 9, 77])
    counts = np.zeros(10)
    for seed in range(4000):
        counts[draw_positions(10, 2, seed, exclude)] += 1
    assert counts[[0, 1, 5, 9]].sum() == 0
    assert np.all(np.abs(counts[[2, 3, 4, 6, 7, 8]] / 4000 - 1 / 3) < 0.04)


def test_few_of_very_many_take_little_memory() -> None:
    drawn = draw_positions(10**12, 1000, seed=0)
    assert len(set(drawn.tolist())) == 1000
    assert drawn.max() > 10**11


def test_pairs_come_in_the_order_asked_for_without_the_bad_ones(inventory: list[ShardInfo]) -> None:
    batch, kept = load_pairs(inventory, np.array([11, 2, 0, 9, 5, 4]), make_decoder(), "txt", threads=2)
    assert kept.tolist() == [11, 0, 5, 4]
    whole = everything(inventory)
    rows = [position - (position > 2) - (position > 9) for position in kept.tolist()]
    assert same(batch, whole[torch.tensor(rows)])


def test_only_shards_with_wanted_pairs_are_read(inventory: list[ShardInfo]) -> None:
    Path(inventory[2].url).unlink()
    batch, kept = load_pairs(inventory, np.array([4, 1]), make_decoder(), "txt")
    assert (kept.tolist(), len(batch)) == ([4, 1], 2)
    none, kept = load_pairs(inventory, np.array([], np.int64), make_decoder(), "txt")
    assert (len(none), len(kept)) == (0, 0)


def test_wrong_positions_and_changed_shards_are_errors(inventory: list[ShardInfo]) -> None:
    with pytest.raises(ValueError, match="positions"):
        load_pairs(inventory, np.array([12]), make_decoder(), "txt")
    with pytest.raises(ValueError, match="different"):
        load_pairs(inventory, np.array([1, 1]), make_decoder(), "txt")
    write_tar(inventory[0].url, sample_members("a", image_bytes(), "x"))
    with pytest.raises(InputError, match="has no sample 4"):
        load_pairs(inventory, np.array([4]), make_decoder(), "txt")


@pytest.fixture
def odd_members() -> list[Member]:
    """Twelve samples of some 40 KB: good ones, a repeated key, no caption, no image, bad json, an empty image."""
    members = []
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
        key = f"set/{3 if number == 7 else number:03d}"
        sample = sample_members(key, image_bytes((20, 20), seed=number), f"number {number}", {"uid": f"{number:032x}"})
        members += [*sample, (f"{key}.noise.bin", noise)]
    return [
        (name, b"" if name == "set/005.jpg" else b"{" if name == "set/006.json" else content)
        for name, content in members
        if name not in ("set/001.txt", "set/002.jpg")
    ]


WANTED = np.array([0, 1, 2, 5, 6, 7, 11])


def kept_places(folder: Path, url: str) -> tuple[ShardInfo, Places]:
    def places(shard: int) -> str:
        return str(folder / f"{shard}.parquet")

    return inspect_shard(0, url, places(0)), places


def no_walk(*_: object, **__: object) -> None:
    raise AssertionError("the shard was read through")


def test_samples_by_their_places_are_those_of_the_whole_shard(
    odd_members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, places = kept_places(tmp_path, write_tar(tmp_path / "a.tar", odd_members))
    for caption in ("txt", "json:uid"):
        expected = list(samples_at(info, WANTED, caption))
        assert len({sample.status for sample in expected}) >= (5 if caption == "txt" else 4)
        with monkeypatch.context() as patched:
            patched.setattr("pipeline.data.samples.read_shard", no_walk)
            assert list(samples_at(info, WANTED, caption, places)) == expected
    # Another version of the shard is read from its beginning.
    write_tar(tmp_path / "a.tar", odd_members[4:])
    assert [sample.key for sample in samples_at(info, np.array([0]), "txt", places)] == ["set/001"]


def test_few_samples_of_an_object_are_asked_for_in_ranges(
    odd_members: list[Member], tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.spans.GAP_BYTES", 1 << 10)
    (url,) = s3_bucket.put(write_tar(tmp_path / "a.tar", odd_members))
    info, places = kept_places(tmp_path, url)
    few = np.array([0, 1, 5, 7])
    expected = list(samples_at(info, few, "txt"))
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.data.samples.read_shard", no_walk)
        assert list(samples_at(info, few, "txt", places)) == expected
        with pytest.raises(AssertionError, match="read through"):
            list(samples_at(info, np.arange(12), "txt", places))
    assert list(samples_at(info, np.arange(12), "txt", places)) == list(samples_at(info, np.arange(12), "txt"))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_is_asked_for_ranges_if_it_answers_them(
    odd_members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr("pipeline.data.spans.GAP_BYTES", 1 << 10)
    write_tar(tmp_path / "a.tar", odd_members)
    with WebServer(tmp_path, ranges=ranges) as server:
        info, places = kept_places(tmp_path, f"{server.url}/a.tar")
        before = len(server.asked)
        found = list(samples_at(info, np.array([3, 9]), "txt", places))
        asked = [range_ for method, range_ in server.asked[before:] if method == "GET"]
        assert found == list(samples_at(info, np.array([3, 9]), "txt"))
    lengths = [int(last) - int(first) + 1 for first, last in (r.removeprefix("bytes=").split("-") for r in asked if r)]
    assert ("" in asked) == (not ranges)
    if ranges:
        assert sum(lengths) < info.bytes / 4


def test_a_range_that_comes_short_is_an_error(
    odd_members: list[Member], tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr("pipeline.data.stream.ATTEMPTS", 1)
    (url,) = s3_bucket.put(write_tar(tmp_path / "a.tar", odd_members))
    info, places = kept_places(tmp_path, url)
    answers: list[object] = [b"short"]

    async def answer(*_: object, **__: object) -> list[object]:
        return answers

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_ranges", answer)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"a\.tar: cannot be read: asked for \d+ bytes at 0, got 5"):
        list(samples_at(info, np.array([0]), "txt", places))
    answers[:] = [OSError("slow down")]
    with pytest.raises(InputError, match="slow down"):
        list(samples_at(info, np.array([0]), "txt", places))


def test_building_a_cache_takes_the_memory_of_a_few_samples(tmp_path: Path) -> None:
    noise = os.urandom(1 << 20)
    path = write_tar(tmp_path / "a.tar", [m for i in range(40) for m in sample_members(str(i), noise, "x")])
    tracemalloc.start()
    build_cache(str(tmp_path / "cache"), [inspect_shard(0, path)], make_decoder(), "txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_cache_holds_all_good_pairs(inventory: list[ShardInfo], tmp_path: Path) -> None:
    cache = build_cache(str(tmp_path / "cache"), inventory, make_decoder(), "txt", threads=2)
    assert cache.positions.tolist() == [position for position in range(12) if position not in (2, 9)]
    assert len(cache) == 10
    assert same(cache.batch(np.arange(10)), everything(inventory))
    rows = np.array([7, 0, 3])
    batch = open_cache(str(tmp_path / "cache")).batch(rows)
    assert same(batch, everything(inventory)[torch.from_numpy(rows)])
    assert batch.tokens.dtype == torch.int64


def test_cache_of_some_positions(inventory: list[ShardInfo], tmp_path: Path) -> None:
    cache = build_cache(str(tmp_path / "cache"), inventory, make_decoder(), "txt", positions=np.array([9, 11, 1, 6]))
    assert cache.positions.tolist() == [1, 6, 11]
    none = build_cache(str(tmp_path / "none"), inventory, make_decoder(), "txt", positions=np.array([2]))
    assert len(none) == 0
    assert len(none.batch(np.array([], np.int64))) == 0


def test_interrupted_build_goes_on_behind_the_last_finished_shard(
    inventory: list[ShardInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK", 2)
    folder = str(tmp_path / "cache")
    read: list[str] = []

    class Interrupted(Decoder):
        def decode_shard(self, samples: object, threads: int = 1) -> object:  # type: ignore[override]
            decoded = super().decode_shard(samples, threads)  # type: ignore[arg-type]
            read.extend(row.key for row in decoded.rows)
            if "008" in read:
                raise KeyboardInterrupt
            return decoded

    broken = Interrupted(SPEC, ByteTokenizer(), 10_000)
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, inventory, broken, "txt")
    with pytest.raises(InputError, match="finished cache"):
        open_cache(folder)

    seen: list[str] = []

    class Watched(Decoder):
        def decode_shard(self, samples: object, threads: int = 1) -> object:  # type: ignore[override]
            decoded = super().decode_shard(samples, threads)  # type: ignore[arg-type]
            seen.extend(row.key for row in decoded.rows)
            return decoded

    cache = build_cache(folder, inventory, Watched(SPEC, ByteTokenizer(), 10_000), "txt")
    assert seen == [f"{position:03d}" for position in range(5, 12)]
    assert same(cache.batch(np.arange(len(cache))), everything(inventory))


@pytest.mark.parametrize("change", ["size", "positions", "shard"])
def test_cache_of_something_else_is_built_anew(
    inventory: list[ShardInfo], tmp_path: Path, change: str, make_shards: Callable[..., list[str]]
) -> None:
    folder = str(tmp_path / "cache")
    build_cache(folder, inventory, make_decoder(), "txt")
    if change == "size":
        cache: PairCache = build_cache(folder, inventory, make_decoder(12), "txt")
        assert cache.batch(np.arange(2)).images.shape == (2, 3, 12, 12)
    elif change == "positions":
        assert len(build_cache(folder, inventory, make_decoder(), "txt", positions=np.array([3]))) == 1
    else:
        other = [inspect_shard(0, make_shards(shards=1, samples=3)[0])]
        assert len(build_cache(folder, other, make_decoder(), "txt")) == 3


@pytest.mark.parametrize("finished", [True, False])
def test_rows_of_another_cache_that_broke_off_are_none_of_this_one(
    inventory: list[ShardInfo], tmp_path: Path, finished: bool
) -> None:
    folder = str(tmp_path / "cache")

    class Interrupted(Decoder):
        def decode_shard(self, samples: object, threads: int = 1) -> object:  # type: ignore[override]
            decoded = super().decode_shard(samples, threads)  # type: ignore[arg-type]
            if any(row.key == key for row in decoded.rows):
                raise KeyboardInterrupt
            return decoded

    broken = Interrupted(SPEC, ByteTokenizer(), 10_000)
    key = "none" if finished else "011"
    with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        build_cache(folder, inventory, broken, "txt")
    key = "000"
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, inventory, broken, "txt", positions=np.array([0]))
    cache = build_cache(folder, inventory, make_decoder(), "txt")
    assert same(cache.batch(np.arange(len(cache))), everything(inventory))


@pytest.mark.parametrize("array", ["images", "positions"])
@pytest.mark.parametrize("left", [None, 16])
@pytest.mark.parametrize("finished", [True, False])
def test_cache_whose_rows_are_gone_is_built_anew(
    inventory: list[ShardInfo], tmp_path: Path, finished: bool, left: int | None, array: str
) -> None:
    folder = tmp_path / "cache"
    build_cache(str(folder), inventory, make_decoder(), "txt")
    if not finished:
        (folder / "cache.json").unlink()
    if left is None:
        (folder / f"{array}.bin").unlink()
    else:
        os.truncate(folder / f"{array}.bin", left)
    cache = build_cache(str(folder), inventory, make_decoder(), "txt")
    assert same(cache.batch(np.arange(len(cache))), everything(inventory))
    assert cache.positions.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 10, 11]


def test_finished_cache_reads_no_shard(inventory: list[ShardInfo], tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    build_cache(folder, inventory, make_decoder(), "txt")
    for info in inventory:
        Path(info.url).unlink()
    assert len(build_cache(folder, inventory, make_decoder(), "txt")) == 10


def test_classes_of_a_labelled_set_become_zero_shot_prompts(tmp_path: Path) -> None:
    names = ["cat", "dog", "cat", "frog", "dog", "cat"]
    members = []
    for number, name in enumerate(names):
        members += sample_members(f"{number}", image_bytes((20, 20), seed=number), None, {"class": name})
    url = write_tar(tmp_path / "labelled.tar", members)
    config = parse_config(
        {
            "out": str(tmp_path / "run"),
            "data": {"shards": write_tar(tmp_path / "pairs.tar", captioned(40))},
            "target": {
                "kind": "shards",
                "shards": url,
                "caption": "json:class",
                "prompt": "a photo of a {}.",
                "pairs": 6,
            },
            "reference": {"pairs": 8, "gradient_pairs": 8},
            "proxy": {"model": "digits-vit"},
        }
    )
    job = ComputingJob(config)
    write_inventory(job.folder.inventory, [inspect_shard(0, str(config.data.shards))])
    target = draw_batches(job).target
    assert sorted(target.captions.tolist()) == sorted(caption_id(f"a photo of a {name}.") for name in names)
    found = dict(zip(target.captions.tolist(), target.tokens, strict=True))
    expected = job.decoder.tokenize(["a photo of a frog."])[0]
    assert torch.equal(found[caption_id("a photo of a frog.")], expected)


def captioned(count: int) -> list[Member]:
    members = []
    for number in range(count):
        members += sample_members(f"{number:03d}", image_bytes((20, 20), seed=number), f"number {number}")
    return members
