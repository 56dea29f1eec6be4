import io
import json
import sys

import pytest

from fiducial.app.cli.output import Output, Table, clean, one_line
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
