"""What the entry points of `ray job submit` share: `--config`, `--set`, `--out` handed to the command line."""

from __future__ import annotations

import argparse
import sys

from pipeline.cli import invoke


def main(command: str, description: str | None) -> None:
    """Run `diffprune COMMAND` with a job's arguments and exit with its status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="CONFIG", help="a YAML config")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a config value")
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    given = parser.parse_args()
    overrides = [part for value in given.set for part in ("--set", value)]
    out = ["--out", given.out] if given.out else []
    sys.exit(invoke([command, given.config, *overrides, *out]))
