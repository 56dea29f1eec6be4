"""How far a long job is, on stderr: a live line on a terminal, a sparse log elsewhere, nothing with --quiet.

    with progress.task("finding", total=200) as task:
        task.advance(1, figure="compliance 93%")
    progress.note("kept: 3f2a")

Tasks may be nested. The line says done/total, rate, time left and the current key figure.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, final

from fiducial.app.cli.output import clean, coloured, one_line, tell

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

EVERY = 10.0
"""Seconds between two lines of one task where stderr is not a terminal."""


class Task(ABC):
    """One counted piece of work."""

    @abstractmethod
    def advance(self, n: int = 1, figure: str = "") -> None:
        """`n` more are done. A non-empty `figure` replaces the key figure shown beside the count."""


class Progress(ABC):
    """Shows tasks and notes."""

    @abstractmethod
    def begin(self, name: str, total: int | None) -> Task:
        """A task of `total` pieces; None when their number is unknown."""

    @abstractmethod
    def end(self, task: Task) -> None:
        """Called once for each task that began, also when it was interrupted."""

    @abstractmethod
    def note(self, text: str) -> None:
        """A remark that stays on the screen."""

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Task]:
        """A task that ends with the block."""
        task = self.begin(name, total)
        try:
            yield task
        finally:
            self.end(task)


def progress_for(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """What suits `stream` (stderr by default)."""
    if quiet:
        return NoProgress()
    stream = stream or sys.stderr
    return RichProgress(stream) if stream.isatty() else PlainProgress(stream)


@final
class NoProgress(Progress):
    """Shows nothing: for library use and --quiet."""

    def begin(self, name: str, total: int | None) -> Task:
        """A task that counts nothing."""
        return _Silent()

    def end(self, task: Task) -> None:
        """Nothing to tidy."""

    def note(self, text: str) -> None:
        """Dropped."""


@final
class PlainProgress(Progress):
    """Lines of a log: at most one every ten seconds for a task, and one at its end."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock

    def begin(self, name: str, total: int | None) -> Task:
        """A task whose first line comes after ten seconds, or at its end."""
        return _Counted(self.note, name, total, self._clock)

    def end(self, task: Task) -> None:
        """Writes the last line of the task."""
        if isinstance(task, _Counted):
            task.finish()

    def note(self, text: str) -> None:
        """One line."""
        tell(self._stream, one_line(text))


@final
class RichProgress(Progress):
    """One live line per running task on a terminal; finished tasks leave their last line behind."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        stream = stream or sys.stderr
        self._console = Console(file=stream, no_color=not coloured(stream), highlight=False)
        self._bars: Bars | None = None
        self._open = 0

    def begin(self, name: str, total: int | None) -> Task:
        """A live line under those that are running."""
        bars = self._bars = self._bars or self._start()
        self._open += 1
        return _Live(bars, bars.add_task(name, name=one_line(name), total=total, figure=""))

    def end(self, task: Task) -> None:
        """Replaces the live line by a plain one; the display stops with the last task, so that it never outlives the job."""
        bars = self._bars
        if bars is None or not isinstance(task, _Live):
            return
        state = next(t for t in bars.tasks if t.id == task.id)
        bars.remove_task(task.id)
        self._open -= 1
        if self._open == 0:
            bars.stop()
            self._bars = None
        total = None if state.total is None else int(state.total)
        self.note(_line(state.fields["name"], int(state.completed), total, state.elapsed or 0.0, state.fields["figure"]))

    def note(self, text: str) -> None:
        """One line above the live ones."""
        from rich.text import Text

        self._console.print(Text(clean(text)))

    def _start(self) -> Bars:
        from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Any) -> Text:
                return Text(_rate(task.completed, task.elapsed or 0.0))

        plain = {"markup": False}
        columns = (TextColumn("{task.fields[name]}", **plain), BarColumn(24), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        # stdout is for results and must not be drawn into this console
        bars = Bars(*columns, TextColumn("{task.fields[figure]}", **plain), console=self._console, transient=True, redirect_stdout=False)
        bars.start()
        return bars


@final
class _Silent(Task):
    def advance(self, n: int = 1, figure: str = "") -> None:
        """Nothing is counted."""


@final
class _Live(Task):
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self.id = bars, task

    def advance(self, n: int = 1, figure: str = "") -> None:
        """Moves the bar."""
        if figure:
            self._bars.update(self.id, advance=n, figure=one_line(figure, 48))
        else:
            self._bars.update(self.id, advance=n)


@final
class _Counted(Task):
    def __init__(self, write: Callable[[str], None], name: str, total: int | None, clock: Callable[[], float]) -> None:
        self._write, self._name, self._total, self._clock = write, name, total, clock
        self._done, self._figure = 0, ""
        self._began = self._last = clock()
        self._first: tuple[int, float] | None = None
        """Pieces that came first, and when: what went before them is no measure of the others."""

    def advance(self, n: int = 1, figure: str = "") -> None:
        """Counts, and writes a line when the last one is ten seconds old."""
        self._done += n
        self._figure = figure or self._figure
        now = self._clock()
        if n:
            self._first = self._first or (self._done, now)
        # the last piece is left to `finish`, which would only repeat it
        if now - self._last >= EVERY and self._done != self._total:
            self._last = now
            first, then = self._first or (self._done, now)
            self._write(_line(self._name, self._done, self._total, now - self._began, self._figure, pace=(self._done - first, now - then)))

    def finish(self) -> None:
        """The line at the end."""
        self._write(_line(self._name, self._done, self._total, self._clock() - self._began, self._figure))


def _line(name: str, done: int, total: int | None, seconds: float, figure: str, *, pace: tuple[int, float] | None = None) -> str:
    """`finding 40/200, 3.9/s, 41 s left, compliance 93%`; the time it took in place of the time left once all is done.

    `pace`: pieces and seconds to judge the speed by, where these are not all.
    """
    pieces, span = pace or (done, seconds)
    parts = [f"{name} {done}" + (f"/{total}" if total is not None else ""), _rate(pieces, span)]
    if total is not None and 0 < done < total:
        parts.append(f"{duration(span * (total - done) / pieces)} left" if pieces else "")
    else:
        parts.append(f"took {duration(seconds)}")
    return ", ".join(p for p in (*parts, figure) if p)


def _rate(done: float, seconds: float) -> str:
    """Pieces per second, or seconds per piece below one; empty when nothing can be said yet."""
    if done <= 0 or seconds <= 0.05:
        return ""
    rate = done / seconds
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
