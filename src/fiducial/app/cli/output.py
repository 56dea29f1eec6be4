"""What reaches the terminal: results on stdout, everything else on stderr, hostile text made harmless.

Attack strings and model answers may hold terminal escapes, and no caller should have to remember that: every path to the terminal
goes through `clean`. With `--json` one object is printed, also when the command failed.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fiducial.core.errors import FiducialError, StorageError

KINDS = ("usage", "error", "config", "data", "method", "model", "endpoint", "missing_extra", "storage", "ledger", "interrupted", "internal")
"""Every value that `error.kind` of a failed command can have."""

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]")
"""ECMA-48 sequences: control sequences, operating-system commands, strings, two-character escapes."""

# C0 and C1 controls without tab and newline; marks that reorder or hide text (bidirectional overrides, zero widths, tags)
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]|[\ud800-\udfff]")


def clean(text: str) -> str:
    r"""`text` without terminal escapes, control characters and marks that reorder or hide text; tabs and newlines stay.

    >>> clean("a\x1b[31mred\x1b[0m\x07b")
    'aredb'
    """
    return HIDDEN.sub("", ESCAPES.sub("", text))


def one_line(text: str, width: int = 0) -> str:
    """`clean` text folded to one line, cut to `width` characters where that is positive.

    >>> one_line("two\\nlines of text", 10)
    'two lines…'
    """
    folded = " ".join(clean(text).split())
    return folded if width <= 0 or len(folded) <= width else folded[: width - 1].rstrip() + "…"


class UnwritableError(StorageError):
    """stdout takes no result: its disk is full, or it is closed. Said on stderr, also with --json."""


class Closed(io.StringIO):
    """Stands for a stdout that was closed before the program began."""

    def write(self, _: str) -> int:
        """Raises UnwritableError."""
        raise UnwritableError("stdout cannot be written: it is closed", hint="send it to a file, or to /dev/null")


def tell(stream: TextIO, text: str) -> None:
    """Writes one line; a reader that has gone away (`| head`), or a log on a full disk, is no reason to stop the work.

    Raises UnwritableError for stdout that cannot be written for another reason.
    """
    _attempt(stream, lambda: stream.write(text + "\n"))


def settle() -> None:
    """Writes what still waits to be written, which would otherwise fail when Python ends. Raises UnwritableError."""
    for stream in (sys.stderr, sys.stdout):
        _attempt(stream, lambda: 0)


def give_streams() -> None:
    """A closed stdout or stderr, for which Python has None, becomes a stream: one that takes nothing, and one that swallows everything."""
    if sys.stdout is None:
        sys.stdout = Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 it is open to the end


def _attempt(stream: TextIO, write: Callable[[], int]) -> None:
    try:
        write()
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
    except UnicodeError:
        raise
    except (OSError, ValueError) as error:  # a closed stream is a ValueError
        _silence(stream)
        if stream is sys.stdout:
            reason = getattr(error, "strerror", None) or error
            raise UnwritableError(f"stdout cannot be written: {reason}", hint="free some space, or send it elsewhere; what the run keeps is kept") from error


def _silence(stream: TextIO) -> None:
    """Lets later writes, and the flush at exit, go nowhere."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def coloured(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that may be given colours (NO_COLOR and TERM=dumb are respected)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings. Cells are text; numeric columns are named in `right`."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    title: str = ""
    right: frozenset[str] = frozenset()

    def plain(self) -> list[str]:
        """Aligned lines with two spaces between columns: what a pipe gets."""
        cells = [self.columns, *[tuple(one_line(c) for c in row) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [self.title] if self.title else []
        for row in cells:
            parts = [c.rjust(w) if name in self.right else c.ljust(w) for c, w, name in zip(row, widths, self.columns, strict=True)]
            lines.append("  ".join(parts).rstrip())
        return lines


@dataclass(slots=True)
class Output:
    """Where a command writes. `run` is the id of the run that it made, once there is one."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    run: str | None = None
    resume: str = ""
    """The command that goes on after an interruption; printed as the last line then."""
    captured: dict[str, Any] | None = None
    """Where the result goes instead of stdout, when the command is a part of another."""
    runs: str | None = None
    """The folder given with --runs; a command that goes on needs it too."""

    def to_resume(self, words: Sequence[str], run: str) -> str:
        """What is typed to go on with `run` of the command `words`.

        >>> Output(runs="my runs").to_resume(["attack", "persona"], "20260101-000000-attack-persona-1a2b")
        "fiducial attack persona --resume 20260101-000000-attack-persona-1a2b --runs 'my runs'"
        """
        return shlex.join(["fiducial", *words, "--resume", run, *(["--runs", self.runs] if self.runs is not None else [])])

    @classmethod
    def of(cls, args: Sequence[str]) -> Output:
        """The switches as they stand anywhere on the command line, so that even a line that does not parse is answered in kind."""
        before = list(args[: args.index("--")]) if "--" in args else list(args)
        return cls(json="--json" in before, quiet="--quiet" in before or "-q" in before, debug="--debug" in before)

    def result(self, data: Any, *parts: str | Table, run: str | None = None) -> None:
        """The result on stdout: the JSON object with --json, otherwise `parts` (lines and tables)."""
        self.run = run or self.run
        if self.captured is not None:
            self.captured["data"] = json.loads(json.dumps(data, default=_plain))
            return
        if self.json:
            self._object({"ok": True, "data": data, "run": self.run})
            return
        self.shown(*parts)

    def shown(self, *parts: str | Table) -> None:
        """Part of a result on stdout as soon as it is known; nothing where the result is an object."""
        if self.json or self.captured is not None:
            return
        for part in parts:
            if isinstance(part, Table):
                self._table(part)
            else:
                tell(sys.stdout, clean(part))

    def note(self, text: str) -> None:
        """A remark on stderr, unless --quiet."""
        if not self.quiet:
            tell(sys.stderr, clean(text))

    def fail(self, kind: str, message: str, hint: str = "") -> None:
        """A failure: the JSON object on stdout with --json, and otherwise two lines on stderr, also with --quiet."""
        if self.json:
            with suppress(UnwritableError):
                self._object({"ok": False, "error": {"kind": kind, "message": clean(message), "hint": clean(hint)}, "run": self.run})
                return
        tell(sys.stderr, f"error: {one_line(message)}" + (f"\nhint: {one_line(hint)}" if hint else ""))

    def refuse(self, error: FiducialError) -> None:
        """`fail` with the text of an error that the user can mend, and how to go on then where the work was only held up."""
        then = f", then {f'go on with: {self.resume}' if self.resume else 'start again'}" if isinstance(error, StorageError) and error.passing else ""
        self.fail(error.kind, error.message, error.hint + then)

    def _object(self, body: dict[str, Any]) -> None:
        # ASCII escapes keep control characters of model output out of a terminal and are valid JSON for everyone
        tell(sys.stdout, json.dumps(body, ensure_ascii=True, default=_plain))

    def _table(self, table: Table) -> None:
        if not sys.stdout.isatty():
            tell(sys.stdout, "\n".join(table.plain()))
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(title=Text(table.title) if table.title else None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for name in table.columns:
            drawn.add_column(Text(name), justify="right" if name in table.right else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(one_line(cell)) for cell in row))
        console = Console(file=sys.stdout, no_color=not coloured(sys.stdout), highlight=False)
        with console.capture() as shown:
            console.print(drawn)
        tell(sys.stdout, shown.get().removesuffix("\n"))


def _plain(value: Any) -> Any:
    """What JSON can hold of a path, a record, a set or another collection."""
    from fiducial.core.records import Record

    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Record):
        return value.model_dump(mode="json")
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Iterable):
        return list(value)
    return str(value)
