import io

import pytest

from fiducial.app.cli.progress import NoProgress, PlainProgress, RichProgress, progress_for


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def log():
    stream, clock = io.StringIO(), Clock()
    return PlainProgress(stream, clock=clock), stream, clock


def test_a_log_has_a_line_every_ten_seconds_and_one_at_the_end(log):
    progress, stream, clock = log
    with progress.task("finding", total=25) as task:
        for _ in range(25):
            clock.now += 1
            task.advance(1, figure="compliance 93%")
    # 25 pieces at one a second: lines after 10 and 20, and at the end
    assert stream.getvalue().splitlines() == [
        "finding 10/25, 1.0/s, 15 s left, compliance 93%",
        "finding 20/25, 1.0/s, 5 s left, compliance 93%",
        "finding 25/25, 1.0/s, took 25 s, compliance 93%",
    ]


def test_what_goes_before_the_first_piece_is_no_measure_of_the_others(log):
    progress, stream, clock = log
    with progress.task("training", total=100) as task:
        clock.now += 30
        task.advance(1)
        for _ in range(10):
            clock.now += 2
            task.advance(1)
    assert stream.getvalue().splitlines() == [
        "training 1/100",
        "training 6/100, 2.0 s each, 3 min 8 s left",
        "training 11/100, 2.0 s each, 2 min 58 s left",
        "training 11/100, 4.5 s each, 6 min 45 s left",
    ]


def test_slow_pieces_say_seconds_each_and_the_last_figure_stays(log):
    progress, stream, clock = log
    with progress.task("training") as task:
        task.advance(figure="loss 0.5")
        clock.now += 8
        task.advance()
    # two pieces in eight seconds
    assert stream.getvalue() == "training 2, 4.0 s each, took 8 s, loss 0.5\n"


def test_the_last_line_comes_also_when_the_work_is_interrupted(log):
    progress, stream, clock = log

    def work():
        with progress.task("finding", total=4) as task:
            clock.now += 2
            task.advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert stream.getvalue() == "finding 1/4, 2.0 s each, 6 s left\n"


def test_notes_are_one_harmless_line(log):
    progress, stream, _ = log
    progress.note("a\nb\x1b[31m")
    assert stream.getvalue() == "a b\n"


def test_a_terminal_gets_a_live_line_that_ends_with_the_last_task(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    progress = progress_for(stream=terminal)
    assert isinstance(progress, RichProgress)
    with progress.task("outer [b]", total=2) as outer, progress.task("inner") as inner:
        inner.advance(3, figure="[red]rate\x1b[2J")
        progress.note("kept [b]")
        outer.advance(2)
    text = terminal.getvalue()
    assert "kept [b]\n" in text
    assert "inner 3" in text
    assert "[red]rate" in text
    assert "\x1b[2J" not in text
    assert text.endswith(("took 0 s\n",))
    assert progress._bars is None


def test_quiet_shows_nothing_and_a_pipe_gets_the_log():
    stream = io.StringIO()
    assert isinstance(progress_for(quiet=True, stream=stream), NoProgress)
    assert isinstance(progress_for(stream=stream), PlainProgress)
    with NoProgress().task("x", total=1) as task:
        task.advance(1, figure="y")
    NoProgress().note("z")
    assert stream.getvalue() == ""
