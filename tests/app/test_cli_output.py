import io
import json
import os
import shlex
import subprocess
import sys

import pytest

from fiducial.app.cli.output import Output, Table, clean, one_line
from fiducial.core.errors import StorageError
from fiducial.core.records import user


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("hostile", "harmless"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x9b2Jb", "ab"),
        ("over\rwrite", "overwrite"),
        ("bell\x07\x08\x00", "bell"),
        ("right\u202eleft\u2066", "rightleft"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("tag\U000e0041", "tag"),
        ("half \ud83d", "half "),
        ("keeps\ttabs\nand 中文 é [red]", "keeps\ttabs\nand 中文 é [red]"),
    ],
)
def test_terminal_escapes_and_hidden_marks_are_removed(hostile, harmless):
    assert clean(hostile) == harmless


def test_a_line_is_folded_and_cut():
    assert one_line("a\n b\x1b[1m c") == "a b c"
    assert one_line("abcdef", 4) == "abc…"


def test_a_table_in_a_pipe_is_aligned_and_plain(capsys):
    table = Table(("name", "n"), [("a", "1"), ("longer\x1b[31m\n", "100")], title="counts", right=frozenset({"n"}))
    Output().result({}, table)
    assert capsys.readouterr().out == "counts\nname      n\na         1\nlonger  100\n"


def test_on_a_terminal_markup_stays_text_and_no_color_is_respected(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    Output().result({}, Table(("what",), [("[red]x[/red]\x1b[2J",)]))
    assert "[red]x[/red]" in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\x1b[3" not in terminal.getvalue()


def test_json_is_one_object_of_ascii_that_holds_records_and_paths(capsys, tmp_path):
    output = Output(json=True)
    output.result({"message": user("\x1b[31m中")[0], "path": tmp_path, "set": {2, 1}}, "not shown", run="r1")
    line = capsys.readouterr().out
    assert line.isascii()
    assert "\x1b" not in line
    assert json.loads(line) == {"ok": True, "data": {"message": {"role": "user", "content": "\x1b[31m中"}, "path": str(tmp_path), "set": [1, 2]}, "run": "r1"}


def test_quiet_silences_remarks_and_not_errors(capsys):
    output = Output(quiet=True)
    output.note("by the way")
    output.fail("config", "wrong\nvalue", "mend it")
    assert capsys.readouterr().err == "error: wrong value\nhint: mend it\n"


def test_switches_are_read_wherever_they_stand_but_not_after_two_dashes():
    assert Output.of(["attack", "x", "--json", "-q", "--debug"]) == Output(json=True, quiet=True, debug=True)
    assert Output.of(["attack", "--", "--json"]) == Output()


def in_a_shell(words, streams):
    """Exit code, stdout and stderr of a command whose streams are redirected."""
    line = f"{shlex.quote(sys.executable)} -m fiducial {words} {streams}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", ["--version", "--version --json", "--help"])
def test_a_result_that_a_full_disk_refuses_is_an_error_and_never_looks_like_a_weakness(words):
    code, _, errors = in_a_shell(words, ">/dev/full")
    assert code == 2
    assert "error: " in errors
    assert "o space left on" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("words", ["--version", "--version --json", "--help"])
def test_a_closed_stdout_is_an_error_on_stderr(words):
    code, _, errors = in_a_shell(words, ">&-")
    assert (code, errors.splitlines()[0]) == (2, "error: stdout cannot be written: it is closed")


@pytest.mark.parametrize("streams", ["2>&-", *(["2>/dev/full"] if os.path.exists("/dev/full") else [])])
def test_stderr_that_cannot_be_written_changes_neither_the_result_nor_the_code(streams):
    code, out, _ = in_a_shell("--version", streams)
    assert (code, out.startswith("fiducial ")) == (0, True)
    assert in_a_shell("nope", streams) == (2, "", "")
    assert json.loads(in_a_shell("nope --json", streams)[1])["error"]["kind"] == "usage"


@pytest.mark.parametrize(("resume", "then"), [("", "start again"), ("fiducial attack direct --resume r1", "go on with: fiducial attack direct --resume r1")])
def test_after_a_full_disk_the_hint_names_what_the_command_can_do(capsys, resume, then):
    Output(resume=resume).refuse(StorageError.from_os(OSError(28, "No space left on device"), "runs/r1"))
    assert capsys.readouterr().err.splitlines()[1] == f"hint: what was written before is kept; free some space, then {then}"
    Output(resume=resume).refuse(StorageError("in use", hint="choose another"))
    assert capsys.readouterr().err.splitlines()[1] == "hint: choose another"
