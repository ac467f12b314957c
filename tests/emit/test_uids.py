from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.emit.uids import UID_DTYPE, pack_uids, read_uids, sort_unique, write_uids
from pipeline.errors import InputError

# Values at both ends and in between, so that high halves tie and both halves use the sign bit.
HALVES = st.sampled_from([0, 1, 2, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
UIDS = st.lists(st.tuples(HALVES, HALVES), max_size=60)


def as_array(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.uint64).reshape(-1, 2).view(UID_DTYPE).reshape(-1)


def as_pairs(uids: np.ndarray) -> list[tuple[int, int]]:
    return [(int(uid["f0"]), int(uid["f1"])) for uid in uids]


@given(UIDS)
@settings(deadline=None)
def test_packing_reads_the_hex_digits_as_high_and_low_halves(pairs: list[tuple[int, int]]) -> None:
    text = pa.array([f"{high:016x}{low:016x}" for high, low in pairs], pa.string())
    assert as_pairs(pack_uids(text)) == pairs
    assert as_pairs(pack_uids(text[1:])) == pairs[1:]
    assert as_pairs(pack_uids(pa.array([uid.upper() for uid in text.to_pylist()], pa.string()))) == pairs


@pytest.mark.parametrize("wrong", ["", "a" * 31, "a" * 33, "g" * 32, "é" * 16, None])
def test_what_is_no_uid_is_quoted(wrong: str | None) -> None:
    with pytest.raises(InputError, match=f"32 hex digits, found {wrong!r}"):
        pack_uids(pa.array(["0" * 32, wrong, "1" * 32]))


@given(UIDS)
@settings(deadline=None)
def test_sorting_is_lexicographic_and_drops_repeats(pairs: list[tuple[int, int]]) -> None:
    assert as_pairs(sort_unique(as_array(pairs))) == sorted(set(pairs))


@given(UIDS, st.integers(1, 20), st.integers(1, 7))
@settings(deadline=None, max_examples=50)
def test_the_file_is_the_same_for_any_chunk(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], chunk: int, batch: int
) -> None:
    folder = tmp_path_factory.mktemp("uids")
    uids = as_array(pairs)
    count = write_uids(
        str(folder / "uids.npy"), (uids[start : start + batch] for start in range(0, len(uids), batch)), chunk
    )
    written = np.load(folder / "uids.npy", mmap_mode="r")
    assert written.dtype == np.dtype("u8,u8")
    assert as_pairs(written) == sorted(set(pairs))
    assert count == len(written)
    assert [path.name for path in folder.iterdir()] == ["uids.npy"]


def test_no_more_than_a_few_chunks_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.emit import uids as module

    longest = 0

    def watched(values: np.ndarray) -> np.ndarray:
        nonlocal longest
        longest = max(longest, len(values))
        return sort_unique(values)

    monkeypatch.setattr(module, "sort_unique", watched)
    # Uids that all share their high half, and are far from uniform: what a split by leading bits could not handle.
    low = np.random.default_rng(0).zipf(1.3, 50_000).astype(np.uint64)
    uids = np.stack([np.zeros(50_000, np.uint64), low], 1).view(UID_DTYPE).reshape(-1)
    write_uids(str(tmp_path / "uids.npy"), (uids[start : start + 500] for start in range(0, 50_000, 500)), chunk=1000)
    assert longest <= 2000
    assert len(np.load(tmp_path / "uids.npy")) == len(np.unique(low))


def test_datacomp_finds_exactly_the_kept_uids(tmp_path: Path) -> None:
    """DataComp's resharder: assert the dtype, then `searchsorted` of (high, low) and compare what is there."""
    rng = np.random.default_rng(1)
    kept = rng.bytes(16 * 1000).hex()
    others = rng.bytes(16 * 1000).hex()
    kept_uids = [kept[start : start + 32] for start in range(0, len(kept), 32)]
    other_uids = [others[start : start + 32] for start in range(0, len(others), 32)]
    for number, part in enumerate((kept_uids[:600], kept_uids[500:])):
        pq.write_table(pa.table({"uid": part}), tmp_path / f"{number}.parquet")
    write_uids(str(tmp_path / "uids.npy"), read_uids([str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")]))
    subset = np.load(tmp_path / "uids.npy", mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")

    def times(uid: str) -> int:
        wanted = np.array([(int(uid[:16], 16), int(uid[16:], 16))], np.dtype("u8,u8"))[0]
        return int(np.searchsorted(subset, wanted, "right") - np.searchsorted(subset, wanted, "left"))

    assert [times(uid) for uid in kept_uids] == [1] * 1000
    assert [times(uid) for uid in other_uids] == [0] * 1000


def test_a_keep_list_with_a_wrong_uid_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": ["nonsense"]}), tmp_path / "0.parquet")
    with pytest.raises(InputError, match=r"0\.parquet.*'nonsense'"):
        list(read_uids([str(tmp_path / "0.parquet")]))
