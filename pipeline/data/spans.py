"""Parts of a plain tar by their places: mapped where the tar is local, else asked for in ranges, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from pipeline.data.places import is_mappable, map_file
from pipeline.data.stream import answers_ranges, patiently
from pipeline.store import storage

#: Start and end of a part, in bytes.
Span = tuple[int, int]

#: Bytes between two parts that are fetched with them rather than asked around.
GAP_BYTES = 128 << 10
#: Parts are joined up to this size.
REQUEST_BYTES = 8 << 20
#: Requests on their way at once.
REQUESTS = 8
#: Share of a remote shard from which on it is faster to read all of it.
LARGEST_SHARE = 0.5


def pays(url: str, size: int, spans: Sequence[Span]) -> bool:
    """Whether reading these parts (ascending) of the shard at `url`, of `size` bytes, is less work than all of it."""
    if is_mappable(url):
        return True
    fetched = sum(request[-1][1] - request[0][0] for request in _requests(spans))
    if fetched > LARGEST_SHARE * size:
        return False
    if not url.startswith(("http://", "https://")):
        return True
    fs, path = storage.filesystem(url)
    return bool(patiently(url, lambda: answers_ranges(fs, path, size)))


def read_spans(url: str, spans: Sequence[Span]) -> Iterator[memoryview]:
    """The bytes of each part (ascending). Raises `InputError` when storage does not give them."""
    if is_mappable(url):
        view = map_file(url)
        yield from (view[start:end] for start, end in spans)
        return
    requests = _requests(spans)
    while some := list(islice(requests, REQUESTS)):
        answers = _fetch(url, [(request[0][0], request[-1][1]) for request in some])
        for request, content in zip(some, answers, strict=True):
            base = request[0][0]
            yield from (memoryview(content)[start - base : end - base] for start, end in request)


def _requests(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Neighbouring parts that one request fetches."""
    request: list[Span] = []
    for span in spans:
        if request and (span[0] - request[-1][1] > GAP_BYTES or span[1] - request[0][0] > REQUEST_BYTES):
            yield request
            request = []
        request.append(span)
    if request:
        yield request


def _fetch(url: str, ranges: Sequence[Span]) -> list[bytes]:
    fs, path = storage.filesystem(url)
    starts, ends = (np.array(ranges, np.int64).T).tolist()

    def ask() -> list[bytes]:
        answers: list[Any] = fs.cat_ranges([path] * len(ranges), starts, ends, on_error="return")
        for (start, end), answer in zip(ranges, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            if len(answer) != end - start:
                raise OSError(f"asked for {end - start} bytes at {start}, got {len(answer)}")
        return answers

    answers: list[bytes] = patiently(url, ask)
    return answers
