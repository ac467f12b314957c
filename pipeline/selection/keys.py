"""How pairs are put in order: sortable integer keys of float32 values, uids as numbers, and seeded draws by uid."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.arrays import Float32, Int64, UInt8, UInt32, UInt64
from pipeline.errors import InputError

#: Bits of an order key.
KEY_BITS = 32

_Keys = TypeVar("_Keys", UInt32, Int64)

_SIGN = np.uint32(0x80000000)


def order_keys(values: Float32) -> UInt32:
    """Integers in the order of float32 `values` [n]; -0.0 and 0.0 share one key. NaN is the caller's to remove."""
    bits = (values + np.float32(0.0)).view(np.uint32)
    bits ^= (bits.view(np.int32) >> 31).view(np.uint32) | _SIGN
    return bits


def value_of(key: int) -> float:
    """The float32 value whose `order_keys` is `key`."""
    bits = np.uint32(key)
    bits = bits ^ _SIGN if bits & _SIGN else ~bits
    return float(bits.view(np.float32))


def sum_equal(keys: _Keys, counts: Int64) -> tuple[_Keys, Int64]:
    """The different ones of `keys` [n], ascending, and the sum of the `counts` [n] of each."""
    if len(keys) == 0:
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def _hex_table() -> UInt8:
    table = np.full(256, 255, dtype=np.uint8)
    for digit, char in enumerate("0123456789abcdef"):
        table[ord(char)] = table[ord(char.upper())] = digit
    return table


_HEX = _hex_table()


def parse_uids(column: Any, where: str = "") -> tuple[UInt64, UInt64]:
    """The high and low 64 bits of uids given as an Arrow string array of 32 hex digits each.

    Uids are compared as these 128-bit numbers everywhere in a selection. Raises `InputError` for another form.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    count = len(column)
    offset_type = np.int64 if pa.types.is_large_string(column.type) else np.int32
    _, offsets, data = column.buffers()
    if count == 0 or data is None:
        if count:
            raise InputError(f"{where}: expected uids of 32 hex digits, found empty ones")
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    ends = np.frombuffer(offsets, dtype=offset_type)[column.offset : column.offset + count + 1]
    if column.null_count or ends[-1] - ends[0] != 32 * count or bool((np.diff(ends) != 32).any()):
        raise InputError(f"{where}: expected uids of 32 hex digits each")
    digits = _HEX[np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]]]
    if bool((digits == 255).any()):
        raise InputError(f"{where}: expected uids of 32 hex digits each")
    octets = (digits[0::2] << 4) | digits[1::2]
    words = octets.reshape(count, 2, 8).view(">u8")[:, :, 0].astype(np.uint64)
    return np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])


def seeded_draw(high: UInt64, low: UInt64, seed: int) -> UInt64:
    """A uniform 64-bit number per uid that depends on the uid and `seed` alone (two rounds of splitmix64)."""
    return _mix(low ^ _mix(high + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)))


def _mix(words: UInt64) -> UInt64:
    return finalised(words + np.uint64(0x9E3779B97F4A7C15))


def finalised(words: UInt64) -> UInt64:
    """splitmix64's finaliser: every bit of the result depends on every bit of the word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
