"""The errors a user meets, and the exit status of each.

Every error that bad input, a bad config or an unfinished run can cause derives from
`DiffpruneError`; the command line prints its message on one line and exits with `exit_status`.
Anything else that reaches the command line is a defect and keeps its traceback.
"""

from __future__ import annotations

import reprlib

#: How what was found is shown: a list of thousands, or one of lists of lists, would not be one line.
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxdict, _SHOWN.maxstring, _SHOWN.maxother = 4, 8, 20, 1000, 1000


class DiffpruneError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_status = 1


class ConfigError(DiffpruneError):
    """A config or a command line that cannot be run: exit status 2, before any work.

    The message is one line: file, key, what was expected, what was found.
    """

    exit_status = 2

    def __init__(self, expected: str, *, key: str = "", found: object = None, file: str = "") -> None:
        where = ": ".join(part for part in (file, key) if part)
        message = f"{where}: {expected}" if where else expected
        if found is not None:
            message += f", found {_SHOWN.repr(found)}"
        super().__init__(" ".join(message.split()))
        self.key = key
        self.file = file

    def in_file(self, file: str) -> ConfigError:
        """The error with the name of the config's file, where it is about a key and names no file yet."""
        if self.file or not self.key:
            return self
        named = ConfigError(str(self), file=file)
        named.key = self.key
        return named


class InputError(DiffpruneError):
    """Data that cannot be used: a shard that cannot be opened, a checkpoint of another model."""


class StageError(DiffpruneError):
    """A stage that cannot start or did not complete: what is missing, and the command that makes it."""


class FingerprintError(StageError):
    """Results on storage were made with other settings than the ones asked for now."""


class NoWorkerError(StageError):
    """None of the workers that score could start."""


class NoteWarning(UserWarning):
    """What a user should know although results are the same: a run prints it, once for all its processes."""
