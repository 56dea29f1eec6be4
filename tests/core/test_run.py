import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fiducial.core.errors import ConfigError, StorageError
from fiducial.core.records import Message
from fiducial.core.run import Run, runs_root


def new(command="loop", **options):
    return Run.create(command, options, {}, seed=7)


def message(text):
    return Message(role="user", content=text)


def test_a_run_is_a_folder_named_by_time_and_command_below_the_runs_root():
    run = Run.create("attack/gcg", {"steps": 10, "goals": Path("g.jsonl")}, {"steps": 10}, seed=7)
    assert run.path.parent == runs_root() == Path(os.environ["FIDUCIAL_RUNS"])
    assert re.fullmatch(r"\d{8}-\d{6}-attack-gcg-[0-9a-f]{4}", run.id)
    content = json.loads((run.path / "run.json").read_text())
    assert list(content)[:3] == ["v", "name", "command"]
    assert content["options"] == {"steps": 10, "goals": "g.jsonl"}
    assert (content["given"], content["seed"], content["status"]) == ({"steps": 10}, 7, "running")
    assert {"python", "torch", "transformers", "fiducial"} <= set(content["versions"])
    assert content["argv"] == sys.argv
    assert content["started"].endswith("+00:00")


def test_runs_stand_in_the_working_folder_by_default(monkeypatch):
    monkeypatch.delenv("FIDUCIAL_RUNS")
    assert runs_root() == Path("runs")


def test_two_runs_of_the_same_second_have_different_folders():
    assert len({new().path for _ in range(20)}) == 20


def test_a_run_that_ends_is_done():
    with new() as run:
        assert run.status == "running"
    assert Run.open(run.id).facts.status == "done"
    assert Run.open(run.id).facts.finished > run.facts.started[:19]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("bad"), "failed"),
        (SystemExit(0), "done"),
        (SystemExit(1), "done"),
        (SystemExit(2), "failed"),
        (SystemExit(130), "interrupted"),
        (SystemExit("no"), "failed"),
    ],
    ids=repr,
)
def test_how_it_ended_is_recorded_and_the_error_goes_on(error, status):
    run = new()
    with pytest.raises(type(error)), run:
        raise error
    facts = Run.open(run.id).facts
    assert facts.status == status
    assert bool(facts.error) == (status == "failed")


def test_a_killed_run_is_interrupted_not_running_and_can_be_taken_up_again():
    code = "import os, signal\nfrom fiducial.core.run import Run\nwith Run.create('loop', {}, {}, 0):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    run = Run.open("last")
    assert run.facts.status == "running"
    assert run.status == "interrupted"
    with run:
        assert Run.open("last").status == "running"
    assert Run.open("last").status == "done"
    assert Run.open("last").facts.resumed == 1


def test_two_processes_do_not_write_one_run():
    run = new()
    code = f"from fiducial.core.run import Run\nwith Run.open({run.id!r}):\n    print('in', flush=True)\n    input()\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(StorageError, match=f"is being written by process {process.pid}"), run:
        pass
    assert run.status == "running"
    process.communicate(b"\n")
    with run:
        pass
    assert run.facts.resumed == 1


def test_open_takes_an_id_a_beginning_the_last_digits_a_folder_or_last():
    first, second = new("check"), new("loop")
    for reference in (first.id, first.id[:-2], first.id[-4:], first.path, str(first.path)):
        if str(reference) == first.id[-4:] == second.id[-4:]:
            continue
        assert Run.open(reference).id == first.id
    assert Run.open("last").id == second.id


def test_open_names_the_nearest_run_or_says_that_there_are_none():
    with pytest.raises(ConfigError, match="there are no runs in"):
        Run.open("last")
    run = new("check")
    with pytest.raises(ConfigError, match="no run") as caught:
        Run.open(run.id.replace("check", "chekc"))
    assert caught.value.hint == f"did you mean '{run.id}'?"
    with pytest.raises(ConfigError, match="no run ''"):
        Run.open("")


def test_an_ambiguous_beginning_lists_the_runs():
    one, two = new(), new()
    with pytest.raises(ConfigError, match="is the beginning of 2 runs") as caught:
        Run.open("2")
    assert one.id in caught.value.hint
    assert two.id in caught.value.hint


def test_all_lists_runs_oldest_first_and_leaves_out_damaged_ones(caplog):
    runs = [new() for _ in range(4)]
    (runs[1].path / "run.json").write_text("{torn")
    (runs_root() / "other").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [run.id for run in Run.all()] == [runs[0].id, runs[2].id, runs[3].id]
    assert "left out" in caplog.text


def test_a_root_can_be_given(tmp_path):
    run = Run.create("loop", {}, {}, 0, root=tmp_path / "mine")
    assert Run.open("last", root=tmp_path / "mine").id == run.id
    assert Run.all() == []


def test_a_file_in_place_of_the_runs_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Run.create("loop", {}, {}, 0, root=tmp_path / "file")


def test_secrets_are_never_written_down(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fiducial", "check", "--api-key", "sk-1", "--token=sk-2", "--max-tokens", "64", "--judge-api-key=sk-3"])
    run = Run.create("check", {"api_key": "sk-4", "judge": {"api_key": "sk-5"}, "max_tokens": 64}, {"api_key": "sk-4"}, 0)
    text = (run.path / "run.json").read_text()
    assert "sk-" not in text
    assert run.facts.argv == ("fiducial", "check", "--api-key", "***", "--token=***", "--max-tokens", "64", "--judge-api-key=***")
    assert run.facts.options["max_tokens"] == 64


def test_metrics_are_appended_and_what_is_not_finite_becomes_none():
    with new() as run:
        run.metrics({"loss": 0.5, "kl": float("nan")}, step=1)
        run.metrics({"loss": 1}, step=2)
    one, two = Run.open(run.id).read_metrics()
    assert (one.step, one.values) == (1, {"loss": 0.5, "kl": None})
    assert (two.step, two.values) == (2, {"loss": 1.0})


def test_lines_of_one_name_are_one_object_and_are_closed_with_the_run():
    with new() as run:
        run.lines("chat", Message).append(message("a"))
        run.lines("chat", Message).append(message("b"))
        assert run.lines("chat", Message) is run.lines("chat", Message)
    assert Run.open(run.id).lines("chat", Message).read() == [message("a"), message("b")]
    assert run.folder("model/adapter").is_dir()


def test_a_finished_stage_is_recognised_by_its_inputs():
    run = new()
    stage = run.stage("find", {"model": "abc", "seed": 1})
    assert not stage.done
    with pytest.raises(ValueError, match="not finished"):
        _ = stage.result
    assert run.result("find") is None
    stage.finish({"rate": 0.5, "where": Path("x")})
    again = Run.open(run.id).stage("find", {"seed": 1, "model": "abc"})
    assert again.done
    assert again.result == {"rate": 0.5, "where": "x"}
    assert run.result("find") == again.result
    assert run.result("prove") is None


def test_an_unfinished_stage_keeps_its_records_while_its_inputs_stay():
    run = new()
    run.stage("find", {"seed": 1}).lines("attempts", Message).append(message("a"))
    stage = Run.open(run.id).stage("find", {"seed": 1})
    assert not stage.done
    assert stage.lines("attempts", Message).read() == [message("a")]


def test_records_of_changed_inputs_are_set_aside_and_never_mixed():
    run = new()
    for seed in (1, 2, 1):
        stage = run.stage("round-1/find", {"seed": seed})
        assert not stage.done
        assert stage.lines("attempts", Message).read() == []
        stage.lines("attempts", Message).append(message(f"seed {seed}"))
        stage.finish({"seed": seed})
    assert run.result("round-1/find") == {"seed": 1}
    kept = sorted((run.path / "stages" / "round-1").glob("find.aside-*/attempts.jsonl"))
    assert {json.loads(p.read_text())["content"] for p in kept} == {"seed 1", "seed 2"}
    assert stage.lines("attempts", Message).read() == [message("seed 1")]


def test_records_without_a_state_are_set_aside():
    run = new()
    (run.path / "stages" / "find").mkdir(parents=True)
    (run.path / "stages" / "find" / "attempts.jsonl").write_text("{}\n")
    assert run.stage("find", {}).lines("attempts", Message).read() == []
    assert (run.path / "stages" / "find.aside-unknown-1" / "attempts.jsonl").exists()


def test_records_may_be_part_of_the_inputs_of_a_stage():
    run = new()
    run.stage("find", {"prompts": [message("a")]}).finish({})
    assert run.stage("find", {"prompts": [message("a")]}).done
    assert not run.stage("find", {"prompts": [message("b")]}).done


def test_the_first_error_is_shown_when_the_end_cannot_be_written_either(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    def work():
        monkeypatch.setattr(os, "replace", full)
        raise ValueError("first")

    run = new()
    with pytest.raises(ValueError, match="first"), run:
        work()
    assert "could not be written" in caplog.text
    assert Run.open(run.path).status == "interrupted"


def test_secrets_in_addresses_lists_and_parts_are_never_written_down(monkeypatch):
    words = ["--base-url", "https://ada:pw-1@host/v1", "judge.api_key=pw-2 pw-3", "--token", "-pw-4", "uri=openai:x?api_key=pw-5&n=2"]
    monkeypatch.setattr(sys, "argv", ["fiducial", *words])
    options = {"judges": [{"api_key": "pw-6"}], "token": ["pw-7"], "set": ["a.secret=pw-8"], "base_url": "https://ada:pw-9@host/v1"}
    run = Run.create("check", options, {}, 0)
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("no answer from http://ada:pw-0@host")
    text = (run.path / "run.json").read_text()
    assert "pw-" not in text
    assert "ada" not in text
    assert run.facts.options["base_url"] == "https://***@host/v1"
    assert run.facts.argv[-1] == "uri=openai:x?api_key=***&n=2"
    assert run.facts.error.endswith("http://***@host")


def test_arguments_and_errors_that_are_not_unicode_do_not_stop_a_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fiducial", "caf\udce9.jsonl"])
    run = new()
    run.stage("s", {"file": "caf\udce9"}).finish({"file": "caf\udce9"})
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("caf\udce9")
    again = Run.open(run.id)
    assert (again.status, again.facts.argv[1], again.facts.error) == ("failed", "caf\udce9.jsonl", "RuntimeError: caf\udce9")
    assert again.result("s") == {"file": "caf\udce9"}


def test_a_kill_while_a_stage_is_set_aside_leaves_no_finished_stage_without_records(monkeypatch):
    with new() as run:
        stage = run.stage("attack", {"n": 1})
        stage.lines("said", Message).append(message("old"))
        stage.finish({"n": 1})
        real, renamed = Path.rename, []

        def killed_after_one(old, target):
            if renamed:
                raise KeyboardInterrupt
            renamed.append(target)
            return real(old, target)

        monkeypatch.setattr(Path, "rename", killed_after_one)
        with pytest.raises(KeyboardInterrupt):
            run.stage("attack", {"n": 2})
        monkeypatch.undo()
        again = run.stage("attack", {"n": 1})
        assert not again.done
        assert again.lines("said", Message).read() == []


def test_a_runs_folder_that_is_a_link_to_nothing_is_a_storage_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match="a link to nothing"):
        Run.create("loop", {}, {}, 0, root=tmp_path / "link")


def test_the_status_of_a_run_that_may_not_be_written_can_be_asked(monkeypatch):
    run = new()
    run._lock.path.touch()
    real = os.open

    def refused(path, flags, *more):
        if str(path).endswith("lock"):
            raise PermissionError(13, "no")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refused)
    assert run.status == "interrupted"


def test_special_tokens_of_a_vocabulary_are_no_secrets():
    given = {"override": ["eos_token=<|im_end|>", "pad_token=<pad>", "hub_token=pw-1"], "bos_token": "<s>", "unk_token": "<u>", "hf_token": "pw-2"}
    facts = Run.create("align/trl", {}, given, 0).facts
    assert facts.given == given | {"override": ["eos_token=<|im_end|>", "pad_token=<pad>", "hub_token=***"], "hf_token": "***"}


def test_a_run_is_opened_with_its_scheme_and_as_of_another_run():
    first, second = (Run.create("check", {}, {}, 0) for _ in range(2))
    assert Run.open(f"run:{first.id}").id == first.id
    assert Run.open("run:last").id == second.id
    assert Run.open("last", before=second).id == first.id
    assert Run.open(second.id, before=second).id == second.id


def test_a_run_that_is_not_there_is_answered_with_the_newest(tmp_path):
    for n in range(14):
        folder = tmp_path / f"2026{n:04}-a"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"v": 1, "name": folder.name, "command": "a", "started": f"{n:04}"}))
    with pytest.raises(ConfigError) as caught:
        Run.open("zzzz", tmp_path)
    assert caught.value.hint.startswith("known: 20260013-a, 20260012-a, ")
    with pytest.raises(ConfigError) as caught:
        Run.open("20260003-b", tmp_path)
    assert caught.value.hint == "did you mean '20260003-a'?"


def test_a_folder_of_runs_below_a_file_is_to_be_another(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        Run.create("a", {}, {}, 0, tmp_path / "file" / "runs")
    assert caught.value.hint == "choose another folder with --runs or FIDUCIAL_RUNS"
