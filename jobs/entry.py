"""What the entry points of `ray job submit` share: their arguments, handed to the command line."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from pipeline.cli import invoke, leave

#: Commands that can take up shards that were set aside.
_RETRYING = {"run", "score"}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and status 2, as those of the `diffprune` command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def main(command: str, description: str | None) -> None:
    """Run `diffprune COMMAND` with a job's arguments and exit with its status."""
    job = getattr(sys.modules["__main__"].__spec__, "name", None)
    parser = _Parser(prog=f"python -m {job}" if job else None, description=description)
    parser.add_argument("--config", required=True, metavar="CONFIG", help="a YAML config")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a config value")
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    if command in _RETRYING:
        parser.add_argument("--retry-failed", action="store_true", help="take up shards that were set aside")
    given = parser.parse_args()
    overrides = [part for value in given.set for part in ("--set", value)]
    out = ["--out", given.out] if given.out else []
    retry = ["--retry-failed"] if getattr(given, "retry_failed", False) else []
    leave(invoke([command, given.config, *overrides, *out, *retry]))
