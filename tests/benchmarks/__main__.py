"""Runs the benchmarks one after the other: `make bench`, or `python -m tests.benchmarks NAME ...` for some of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run the benchmarks named, or all; returns how many failed."""
    scripts = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    scripts.remove("models")  # shared by the others
    failed = 0
    for name in sys.argv[1:] or scripts:
        print(f"== {name}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
