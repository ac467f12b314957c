"""Formulas and headers are parsed by several threads at once, with garbage collection in between."""

from __future__ import annotations

import gc
import io
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.selection import layers
from pipeline.selection.formula import Array, parse_formula
from pipeline.selection.parsing import read_npy_header

SECONDS = 4


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places as often as they can: what goes wrong once in hours does so in seconds."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-5)
    gc.set_threshold(50)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*thresholds)


class Litter:
    """Runs Python while it is collected, which lets another thread go on."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(range(50))


@pytest.mark.parametrize("values", [np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3).T, np.array([], np.int8)])
def test_a_layer_is_read_as_it_was_written(values: Array, tmp_path: Path) -> None:
    layers.write(str(tmp_path), "layer", 3, values)
    found = layers.read(str(tmp_path), "layer", 3)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.usefixtures("hasty")
def test_threads_do_not_disturb_each_other() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((3, 2), np.float32))
    formula = parse_formula("utility + 2 * similarity", "select.by", ["utility", "similarity"])
    columns = {"utility": np.ones(2), "similarity": np.ones(2)}
    end = time.monotonic() + SECONDS

    def work(number: int) -> int:
        rounds = 0
        while time.monotonic() < end:
            Litter()
            if number % 2:
                assert formula.evaluate(columns, {}).tolist() == [3, 3]
            else:
                assert read_npy_header(io.BytesIO(buffer.getvalue())) == ((3, 2), False, np.float32)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(work, range(4))) > 0
