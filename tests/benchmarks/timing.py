"""Clocks for work on a device, which goes on after a call has returned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tests.benchmarks.needs import skip


def device_named(name: str) -> torch.device:
    """The device, or the end of the benchmark where it is a GPU that this machine lacks."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        skip("no GPU here")
    return torch.device(name)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 0) -> float:
    """Median of the seconds of a call, after some that warm up."""
    times = []
    for _ in range(warm_up + repeats):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warm_up:])
