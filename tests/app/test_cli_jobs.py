import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from fiducial.app.cli import main
from fiducial.app.cli.jobs import options_command
from fiducial.core.run import Run


class GateSection(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    max_benign_refusal: float = Field(default=0.1, ge=0, le=1)
    """Share of harmless requests that may be refused."""


class JobOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str = "smollm2"
    """The model."""
    minutes: float = 30
    """Time to spend."""
    seed: int = 0
    goals: str = "shipped"
    attacks: tuple[str, ...] = ("direct", "persona")
    gate: GateSection = GateSection()


@dataclass
class Outcome:
    exit_code: int = 0
    lines: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def runner(options, run, progress):
    with progress.task("finding", total=1) as task:
        if options.seed == 13 and run.facts.resumed == 0:
            raise KeyboardInterrupt
        task.advance(1, figure="compliance 93%")
    refused = options.gate.max_benign_refusal < 0.05
    return Outcome(int(refused), [f"gate {'refused' if refused else 'passed'} \x1b[31m{options.model}"], {"minutes": options.minutes, "goals": options.goals})


@pytest.fixture(autouse=True)
def _job(monkeypatch):
    module = ModuleType("job_for_tests")
    module.JobOptions, module.ready, module.runner = JobOptions, lambda options: None, runner
    module.job = options_command("job", "job_for_tests:JobOptions", "job_for_tests:ready", "job_for_tests:runner", "A job.", budgeted=True)
    monkeypatch.setitem(sys.modules, "job_for_tests", module)
    monkeypatch.setitem(main.JOBS, "job", ("job_for_tests:job", "A job."))


def test_the_model_flags_and_overrides_reach_the_runner(call):
    body, code = call("job", "tiny", "--minutes", "5", "--goals", "g.jsonl", "gate.max_benign_refusal=0.2")
    assert code == 0
    assert body["data"] == {"minutes": 5.0, "goals": "g.jsonl"}
    facts = Run.open(body["run"]).facts
    assert facts.given == {"model": "tiny", "minutes": 5.0, "goals": "g.jsonl", "gate": {"max_benign_refusal": 0.2}}
    assert facts.options["attacks"] == ["direct", "persona"]
    assert facts.status == "done"


def test_a_refusing_gate_exits_with_1_unless_told_otherwise(run):
    assert run("job", "gate.max_benign_refusal=0.01").exit_code == 1
    assert run("job", "gate.max_benign_refusal=0.01", "--exit-zero").exit_code == 0


def test_the_result_is_alone_on_stdout_and_cleaned(run):
    result = run("job")
    assert result.stdout == "gate passed smollm2\n"
    assert "finding 1/1" in result.stderr
    assert "compliance 93%" in result.stderr


def test_the_command_line_goes_before_the_recipe_and_the_recipe_before_the_default(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fiducial: 1\nminutes: 7\nseed: 3\n", encoding="utf-8")
    text = run("job", "--recipe", recipe, "--seed", "4", "--show-config").stdout
    assert text.startswith("fiducial: 1  #")
    assert f"minutes: 7.0  # {recipe}:2\n" in text
    assert "seed: 4  # command line\n" in text
    assert "goals: shipped  # default\n" in text
    assert Run.all() == []


def test_an_interrupted_job_names_the_command_that_goes_on_with_its_options(run, call):
    first = run("job", "seed=13", "minutes=2")
    name = Run.open("last").id
    assert first.exit_code == 130
    assert first.stderr.splitlines()[-1] == f"go on with: fiducial job --resume {name}"
    body, code = call("job", "--resume", "last")
    assert (code, body["run"], body["data"]["minutes"]) == (0, name, 2.0)
    assert f"minutes: 2.0  # run {name}\n" in run("job", "--resume", name, "--show-config").stdout


def test_options_changed_at_a_resume_are_kept_for_the_next(run, call):
    run("job", "seed=13", "minutes=2")
    name = Run.open("last").id
    body, _ = call("job", "--resume", name, "minutes=9")
    assert body["data"]["minutes"] == 9.0
    facts = Run.open(name).facts
    assert (facts.options["minutes"], facts.given["minutes"], facts.given["seed"]) == (9.0, 9.0, 13)
    assert call("job", "--resume", name)[0]["data"]["minutes"] == 9.0


def test_the_command_that_goes_on_names_the_folder_of_runs_when_it_was_given(run, tmp_path):
    folder = tmp_path / "my runs"
    first = run("job", "seed=13", "--runs", folder)
    assert first.exit_code == 130
    name = next(folder.iterdir()).name
    assert first.stderr.splitlines()[-1] == f"go on with: fiducial job --resume {name} --runs '{folder}'"


def test_a_comma_list_is_accepted_where_an_option_holds_several_values(call):
    for word in ("attacks=direct,past_tense", "attacks=[direct, past_tense]"):
        body, _ = call("job", word)
        assert Run.open(body["run"]).facts.options["attacks"] == ["direct", "past_tense"]
    assert Run.open(call("job", "attacks=direct")[0]["run"]).facts.options["attacks"] == ["direct"]
    assert Run.open(call("job", "model=a,b")[0]["run"]).facts.options["model"] == "a,b"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["gate.max_benign=1"], "did you mean 'max_benign_refusal'?"),
        (["mintes=3"], "did you mean 'minutes'?"),
        (["one", "two"], "the model is 'one'; options are written train.epochs=3"),
        (["--recipe", "a.yaml", "--resume", "last"], ""),
    ],
)
def test_what_cannot_be_understood_exits_with_2_and_makes_no_run(call, args, hint):
    body, code = call("job", *args)
    assert (body["error"]["kind"], code) == ("config", 2)
    assert hint in body["error"]["hint"]
    assert Run.all() == []


def test_the_help_lists_every_key_with_its_default(run):
    text = " ".join(run("job", "--help").stdout.split())
    assert "gate.max_benign_refusal Share of harmless requests that may be refused. [default: 0.1]" in text
    assert "attacks [default: direct persona]" in text


def test_a_model_of_the_last_run_is_of_the_one_before_this(call):
    before = Run.create("align/dpo", {}, {}, 0)
    body, code = call("job", "run:last")
    assert code == 0, body
    facts = Run.open(body["run"]).facts
    assert (facts.options["model"], facts.given["model"]) == (f"run:{before.id}",) * 2


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("seed: 1\ngate:\n  max_direct: 0.1\n", 3, "govern/release has no option 'max_direct'"),
        ("seed: 1\nattacks:\n  - attack/persona\n  - attack/persna\n", 4, "no method 'attack/persna'"),
        ("objective: align/dpoo\n", 1, "no method 'align/dpoo'"),
        ("objective: align/dpo\nobjective_options:\n  betta: 1\n", 3, "align/dpo has no option 'betta'"),
    ],
)
def test_what_a_loops_recipe_names_wrongly_is_said_with_its_file_and_line(call, tmp_path, text, line, message):
    path = tmp_path / "loop.yaml"
    path.write_text(text, encoding="utf-8")
    body, code = call("loop", "--recipe", path)
    assert code == 2
    assert body["error"]["message"] == f"{path}:{line}: {message}"
