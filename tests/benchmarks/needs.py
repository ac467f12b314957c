"""What a benchmark may lack on a machine: it then says so and is skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

#: Exit status of a benchmark that this machine lacks something for.
SKIPPED = 77


def skip(reason: str) -> NoReturn:
    """End the benchmark: this machine cannot run it."""
    print(f"skipped: {reason}")
    raise SystemExit(SKIPPED)


def real_pairs() -> Path:
    """The folder of real pairs, or the end of the benchmark where there is none."""
    folder = os.environ.get("DIFFPRUNE_TEST_DATA")
    if not folder:
        skip("it needs real pairs; set DIFFPRUNE_TEST_DATA to their folder")
    return Path(folder)
