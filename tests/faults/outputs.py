"""What a run leaves behind, as bytes that can be compared: everything but times, and why each exception is one."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

#: Files that are not compared. TensorBoard's are named after host, process and time, and each start begins a new one.
LEFT_OUT = ("tensorboard/*",)

#: Keys of JSON files that are not compared: how long something took, when it was done, and who did it.
TIMES = ("seconds", "worker_seconds", "pairs_per_worker_second", "finished", "worker")

#: Tables of the report that are not compared: the same times again.
TIME_TABLES = re.compile(rb"<table>\s*<caption>(?:Time per stage|Scoring)</caption>.*?</table>", re.DOTALL)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by relative path, without `LEFT_OUT` and without times (`TIMES`, `TIME_TABLES`)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT):
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps(_without_times(json.loads(data))).encode()
        elif path.suffix == ".html":
            data = TIME_TABLES.sub(b"", data)
        found[name] = data
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(child) for key, child in value.items() if key not in TIMES}
    return [_without_times(child) for child in value] if isinstance(value, list) else value


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """What is absent, unexpected or different."""
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())),
        *(f"{name} differs" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]),
    ]
