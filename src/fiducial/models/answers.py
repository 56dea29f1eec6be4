"""Answers of remote models on disk, so that a repeated or resumed run asks for nothing twice."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from pydantic import ValidationError

from fiducial.core.records import Completion

log = logging.getLogger(__name__)

WAIT = 30.0
"""Seconds to wait while another process writes."""


class Answers:
    """Completions by key, in one SQLite file that several processes may share. Used from one thread.

    A file that cannot be used costs money but not the run: it is reported once and left alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
            self._file.execute("pragma journal_mode = wal")
            self._file.execute("pragma synchronous = normal")
            self._file.execute("create table if not exists answers (key text primary key, line text not null) without rowid")
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def get(self, key: str) -> Completion | None:
        """The completion kept under `key`."""
        if self._file is None:
            return None
        try:
            row = self._file.execute("select line from answers where key = ?", (key,)).fetchone()
            return Completion.parse(row[0]) if row else None
        except sqlite3.Error as error:
            self._give_up(error)
        except (ValueError, ValidationError):  # written by another version
            pass
        return None

    def put(self, key: str, completion: Completion) -> None:
        """Keeps a completion."""
        if self._file is None:
            return
        # half a surrogate pair, which SQLite cannot hold, becomes its JSON escape and is read back the same
        line = completion.line().encode(errors="backslashreplace").decode()
        try:
            self._file.execute("insert or replace into answers values (?, ?)", (key, line))
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Closes the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: Exception) -> None:
        log.warning("answers are not kept: %s: %s", self.path, error)
        self.close()
