"""Order keys sort as the values do, uids as the numbers that they write, and draws depend on the seed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.selection.keys import _mix, order_keys, parse_uids, seeded_draw, value_of

FLOATS = st.floats(width=32, allow_nan=False)


@given(st.lists(FLOATS, min_size=1))
def test_keys_are_in_the_order_of_the_values(values):
    array = np.array(values, dtype=np.float32)
    keys = order_keys(array)
    assert keys.dtype == np.uint32
    assert ((keys[:, None] < keys) == (array[:, None] < array)).all()
    assert [value_of(int(key)) for key in keys] == array.tolist()


def test_keys_of_the_extremes():
    values = np.array([-np.inf, -3.4e38, -1e-45, -0.0, 0.0, 1e-45, np.inf], dtype=np.float32)
    keys = order_keys(values)
    assert np.argsort(keys, kind="stable").tolist() == list(range(7))
    assert keys[3] == keys[4]
    assert values.tolist()[3] == 0.0  # the values themselves are left as they are


UIDS = ["0123456789abcdeffedcba9876543210", "f" * 32, "0" * 31 + "1", "ABCDEF" + "0" * 26]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_uids_are_the_numbers_that_they_write(kind):
    column = pa.array(["00" * 16, *UIDS], kind)
    for given_column in (column.slice(1), pa.chunked_array([column.slice(1, 2), column.slice(3)])):
        high, low = parse_uids(given_column)
        assert [(int(h) << 64) | int(w) for h, w in zip(high, low, strict=True)] == [int(uid, 16) for uid in UIDS]


@pytest.mark.parametrize("bad", [["", ""], ["0" * 31], ["0" * 33, "0" * 31], ["g" * 32], ["0" * 31 + "é"], [None]])
def test_other_uids_are_refused_with_the_file(bad):
    with pytest.raises(InputError, match=r"a\.parquet: expected uids of 32 hex digits"):
        parse_uids(pa.array(bad, pa.string()), "a.parquet")


def test_no_uids_are_no_numbers():
    high, low = parse_uids(pa.array([], pa.string()))
    assert len(high) == len(low) == 0


def test_draws_are_uniform_and_depend_on_the_whole_uid_and_the_seed():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 2**63, (2, 20_000)).astype(np.uint64)
    draw = seeded_draw(high, low, 3)
    assert np.abs(np.histogram(draw.astype(np.float64) / 2.0**64, 10, (0, 1))[0] - 2000).max() < 200
    assert (draw == seeded_draw(high, low, 3)).all()
    others = [
        seeded_draw(high, low, 4),
        seeded_draw(high + np.uint64(1), low, 3),
        seeded_draw(high, low + np.uint64(1), 3),
    ]
    for other in others:
        assert abs(np.corrcoef(draw.astype(float), other.astype(float))[0, 1]) < 0.03
    assert (seeded_draw(high, low, -1) == seeded_draw(high, low, 2**64 - 1)).all()  # any integer is a seed


def test_draws_are_splitmix64s():
    # The generator's first three numbers for seed 0, as its author's program prints them.
    step = 0x9E3779B97F4A7C15
    states = np.array([number * step % 2**64 for number in range(3)], dtype=np.uint64)
    assert [hex(word) for word in _mix(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
