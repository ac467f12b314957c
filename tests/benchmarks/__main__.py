"""Runs the benchmarks one after the other: `make bench`, or `python -m tests.benchmarks NAME ...` for some of them."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.needs import SKIPPED

#: What the others share.
_SHARED = ("models", "needs", "timing")


def benchmarks() -> dict[str, str]:
    """The benchmarks by name, with the first line of what they say of themselves."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text())) or "" for path in files}
    return {name: doc.splitlines()[0] for name, doc in docs.items() if name not in _SHARED}


def main() -> int:
    """Run the benchmarks named, or all; returns how many failed. Those that lack something here say so."""
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all take hours on a small machine")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"expected names out of {', '.join(known)}, found {', '.join(sorted(unknown))}")
    if options.list:
        for name, line in known.items():
            print(f"{name:20} {line}")
        return 0
    failed = 0
    for name in options.names or known:
        print(f"== {name}", flush=True)
        status = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=False).returncode
        failed += status not in (0, SKIPPED)
    return failed


if __name__ == "__main__":
    sys.exit(main())
