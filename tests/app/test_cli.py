import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import click
import pytest

from fiducial import __version__
from fiducial.app.cli.commands import Command
from fiducial.app.cli.output import KINDS

HEAVY = ("torch", "transformers", "numpy", "scipy", "sklearn", "accelerate", "peft", "datasets", "inspect_ai", "sqlalchemy", "openai", "jinja2")


def process(*args, **kwargs):
    return subprocess.run([sys.executable, "-m", "fiducial", *args], capture_output=True, text=True, timeout=60, **kwargs)


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["methods"],
        ["explain", "oversee/refusal"],
        ["attack", "direct", "--help"],
        ["align", "dpo", "--help"],
        ["runs"],
        ["check", "--help"],
        ["loop", "--help"],
    ],
)
def test_help_and_listings_load_nothing_heavy(args, tmp_path):
    code = f"""
import sys, json
from fiducial.app.cli.main import cli
try:
    cli.main({args!r})
except SystemExit as end:
    print(json.dumps([end.code, [m for m in {HEAVY!r} if m in sys.modules]]))
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | {"FIDUCIAL_RUNS": str(tmp_path)})
    print(f"{' '.join(args)}: {time.monotonic() - began:.2f} s")
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []], done.stderr


@pytest.mark.parametrize("args", [["--help"], ["methods"], ["explain", "align/dpo"]])
def test_what_only_reads_does_not_even_load_pydantic(args):
    code = f"import sys; from fiducial.app.cli.main import cli\ntry: cli.main({args!r})\nexcept SystemExit: assert 'pydantic' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_every_command_in_the_help_can_be_made_and_has_the_common_switches(run):
    from fiducial.app.cli.main import AREAS, RECORDS, cli

    for name in [*RECORDS, *(a for a in AREAS if a in cli.known())]:
        result = run(name, "--help")
        assert result.exit_code == 0, name
        assert "--json" in result.stdout
        assert "--debug" in result.stdout


def test_the_version_is_printed_alone(run, call):
    assert run("--version").stdout == f"fiducial {__version__}\n"
    assert call("--version") == ({"ok": True, "data": {"version": __version__}, "run": None}, 0)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["atack"], "did you mean 'attack'?"),
        (["attack", "persna"], "did you mean 'persona'?"),
        (["methods", "--jsno"], "did you mean '--json'?"),
        (["attack", "direct", "--max-token", "3"], "did you mean '--max-tokens'?"),
        (["explain", "refusl"], "did you mean 'oversee/refusal'?"),
        (["methods", "atack"], "did you mean 'attack'?"),
    ],
)
def test_a_wrong_name_offers_the_nearest_one_and_exits_with_2(run, args, hint):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    error, hinted = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert hinted == f"hint: {hint}"


def test_a_failure_with_json_is_one_object_on_stdout_and_nothing_on_stderr(run):
    result = run("attack", "persna", "--json")
    assert json.loads(result.stdout) == {
        "ok": False,
        "error": {"kind": "usage", "message": "fiducial attack has no method 'persna'", "hint": "did you mean 'persona'?"},
        "run": None,
    }
    assert result.stderr == ""


def test_every_error_of_the_program_has_a_kind_of_the_closed_set():
    from fiducial.core import errors

    kinds = {e.kind for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.FiducialError)}
    assert kinds <= set(KINDS)


def test_a_users_mistake_shows_no_traceback_unless_debug_is_asked_for(run):
    assert "Traceback" not in run("explain", "nothing").stderr
    assert "Traceback" in run("explain", "nothing", "--debug").stderr


def test_a_fault_of_the_program_is_one_line_with_the_saved_traceback(run, plugin, script):
    result = run("evaluate", "breaks", script, "-q")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: internal fault, RuntimeError: a fault (traceback: ")
    with open(line.removesuffix(")").rpartition(" ")[2], encoding="utf-8") as file:
        assert 'raise RuntimeError("a fault' in file.read()
    os.remove(line.removesuffix(")").rpartition(" ")[2])


def test_a_full_disk_is_a_storage_error_that_says_how_to_go_on(call, plugin, script):
    body, code = call("evaluate", "breaks", script, "--how", "disk")
    assert code == 2
    assert body["error"]["kind"] == "storage"
    assert body["error"]["message"] == "no space left on the disk while writing /full/items.jsonl"
    assert body["error"]["hint"] == f"what was written before is kept; free some space, then go on with: fiducial evaluate breaks --resume {body['run']}"
    assert os.strerror(errno.ENOSPC) not in body["error"]["message"]


def test_an_interrupt_exits_with_130_and_the_last_line_is_the_command_that_goes_on(run, plugin, script):
    result = run("evaluate", "breaks", script, "--how", "stop")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("go on with: fiducial evaluate breaks --resume ")


def test_broken_yaml_is_one_line_with_file_and_line(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: 1\nb: c: d\n", encoding="utf-8")
    done = process("run", "broken.yaml", cwd=tmp_path)
    assert done.returncode == 2
    line, hint = done.stderr.splitlines()
    assert line.startswith("error: broken.yaml:2:5: not valid YAML")
    assert hint.startswith("hint: ")


def test_an_endpoint_that_refuses_is_one_line_and_exit_2(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "goals.txt").write_text("How do I pick a lock?\n", encoding="utf-8")
    address = f"http://127.0.0.1:{port}/v1"
    done = process("check", "openai:m", f"base_url={address}", "--goals", "goals.txt", "-q", cwd=tmp_path, env=os.environ | {"OPENAI_API_KEY": "none"})
    assert done.returncode == 2
    line, hint = done.stderr.splitlines()
    assert line.startswith(f"error: {address}: no connection")
    assert hint.startswith("hint: start the server")


def test_an_endpoint_that_stalls_is_one_line_and_exit_2(tmp_path):
    (tmp_path / "goals.txt").write_text("".join(f"How do I pick lock {n}?\n" for n in range(8)), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are taken, and nothing is ever said
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        code = f"""
import sys
from fiducial.models.remote import RemoteModel
RemoteModel.__init__.__kwdefaults__ |= {{"timeout": 1.5, "retries": 0}}  # a minute and three more tries
from fiducial.app.cli.main import main
sys.argv = ["fiducial", "check", "openai:m", "base_url={address}", "--goals", "goals.txt", "-q"]
main()
"""
        environment = os.environ | {"OPENAI_API_KEY": "none"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    line, hint = done.stderr.splitlines()
    assert line == f"error: {address}: 5 requests in a row failed, the last with: no answer within 1.5 seconds"
    assert hint.startswith("hint: ")


def test_an_interrupt_in_mid_training_exits_with_130_and_says_how_to_go_on(tmp_path):
    rows = [{"prompt": "a", "chosen": f"b{n}", "rejected": "c"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [sys.executable, "-m", "fiducial", "align", "dpo", "tiny", "--data", "pairs.jsonl", "--epochs", "1000", "--save-every", "1", "--runs", "runs"]
    # a shell starts what it does not wait for with interrupts ignored, and that is handed down
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as running:
        try:
            deadline = time.monotonic() + 50
            while not list(tmp_path.glob("runs/*/**/*.safetensors")):
                assert running.poll() is None, running.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130, said
    assert said.splitlines()[-1].startswith("go on with: fiducial align dpo"), said


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.Popen([sys.executable, "-m", "fiducial", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout.close()
    assert done.stderr.read() == b""
    done.stderr.close()
    assert done.wait(timeout=60) == 0


def test_the_module_can_be_run():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fiducial {__version__}\n", "")


def test_no_command_at_all_shows_the_help_on_stderr(run):
    result = run()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "fiducial AREA METHOD [MODEL]" in result.stderr


def test_runs_are_where_they_are_asked_to_be_and_only_for_that_command(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_RUNS", "before")
    assert str(tmp_path / "elsewhere") in run("runs", "--runs", tmp_path / "elsewhere").stdout
    assert os.environ["FIDUCIAL_RUNS"] == "before"


def test_a_command_without_the_program_around_it_still_prints():
    from click.testing import CliRunner

    @click.command(cls=Command)
    @click.pass_context
    def alone(context):
        from fiducial.app.cli.commands import output_of

        output_of(context).result({}, "done")

    assert CliRunner().invoke(alone, []).stdout == "done\n"
