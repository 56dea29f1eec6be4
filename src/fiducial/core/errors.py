"""Errors a user can act on.

    FiducialError            what was wrong, and what to do about it
    ├── ConfigError          an option or a recipe
    ├── DataError            a row, a file of rows
    ├── MethodError          an unknown method, or one that cannot serve here
    ├── ModelError           a model that cannot be opened or used
    │   └── EndpointError    a remote model that refuses, stalls or answers nonsense
    ├── MissingExtraError    a package that was not installed
    ├── StorageError         disk full, folder not writable, run locked
    └── LedgerError          the log of events does not verify

Exit codes of the command line: 0 done, 1 done and a gate refused or a weakness was found, 2 could not run, 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from typing import ClassVar


class FiducialError(Exception):
    """Something the user can mend. `hint` says how; `key` names the option it is about, for who knows where that was written."""

    kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "", key: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.key = key

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(FiducialError):
    """An option or recipe value that cannot be used."""

    kind = "config"


class DataError(FiducialError):
    """A data file or row that cannot be used; the message starts with `file:line:` where there is one."""

    kind = "data"


class MethodError(FiducialError):
    """A method that does not exist or does not fit the model it was given."""

    kind = "method"


class ModelError(FiducialError):
    """A model that cannot be opened, or lacks what a method needs."""

    kind = "model"


class EndpointError(ModelError):
    """A remote model that refused, stalled, or answered something unreadable."""

    kind = "endpoint"


class MissingExtraError(FiducialError):
    """An optional package is needed. The hint is the command that installs it, in the folder of this project, which is in no package index."""

    kind = "missing_extra"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package '{package}', which is not installed", hint=f'in the folder of the project: pip install -e ".[{extra}]"')


class StorageError(FiducialError):
    """The disk refused: full, read-only, or in use by another process."""

    kind = "storage"
    passing: bool = False
    """Whether the same work can go on once the disk is mended; how, the command knows."""

    @classmethod
    def from_os(cls, error: OSError, path: object) -> StorageError:
        """Translates an operating-system error on `path`."""
        if error.errno == errno.ENOSPC:
            return cls.passed(f"no space left on the disk while writing {path}", hint="what was written before is kept; free some space")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            return cls(f"{path} cannot be written: {error.strerror}", hint="choose another folder with --runs or FIDUCIAL_RUNS")
        return cls.passed(f"{path}: {error.strerror or error}", hint="check the disk")

    @classmethod
    def passed(cls, message: str, *, hint: str) -> StorageError:
        """An error that passes with its cause."""
        error = cls(message, hint=hint)
        error.passing = True
        return error


class LedgerError(FiducialError):
    """The hash chain is broken; the message names the first line that does not fit."""

    kind = "ledger"


def nearest(word: str, known: Iterable[str], *, shown: Sequence[str] = ()) -> str:
    """A hint that offers the closest of `known`, or lists the first few of them by name, or as they stand in `shown`."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    names = list(shown) or names
    return "known: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
