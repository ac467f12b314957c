"""Pairs on their way to the device: on a GPU the next ones are made and copied while those before are in use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from pipeline.types import PairBatch


def on_device(batch: PairBatch, order: torch.Tensor, size: int, device: torch.device) -> Iterator[PairBatch]:
    """Parts of at most `size` pairs of a batch on the CPU, in the order of these rows int64 `[n]`, on the device."""
    return to_device((batch[rows] for rows in torch.split(order, size)), device)


def to_device(parts: Iterator[PairBatch], device: torch.device) -> Iterator[PairBatch]:
    """Parts that lie on the CPU, on the device; on a GPU each is made and copied while the one before is in use."""
    return _copied_ahead(parts, device) if device.type == "cuda" else (part.to(device) for part in parts)


def _copied_ahead(parts: Iterator[PairBatch], device: torch.device) -> Iterator[PairBatch]:
    """Parts by way of pinned memory and a stream of its own; a thread gathers and pins each while one is in use."""
    copies, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]

    def copied() -> PairBatch | None:
        part = next(parts, None)
        with torch.cuda.stream(copies):  # the current stream is each thread's own
            return None if part is None else part.pinned().to(device, non_blocking=True)

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(copied)
        while (part := ahead.result()) is not None:
            # Before the next copy is queued, which this part need not wait for.
            here.wait_stream(copies)
            ahead = thread.submit(copied)
            # The memory is the copying stream's: it must not be used again before `here` is done with it.
            part.record_stream(here)
            yield part
