"""Memory that a process keeps: large tensors that are freed and taken again bring no new pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from pipeline.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for round in range(30):
    if round == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(128, 50, 512)  # 12.5 MiB
    for _ in range(6):
        x = torch.tanh(x) + 1
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_tensors_freed_and_taken_again_bring_no_new_pages() -> None:
    def pages(*arguments: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout)

    kept = pages("kept")
    # Now and then something small lies above the tensors, so that without the call nothing is given back either.
    assert any(kept * 10 < pages("given back") for _ in range(5))
