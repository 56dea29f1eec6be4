import json

import pytest

from fiducial.core.records import Attempt
from fiducial.core.run import Run


@pytest.fixture
def recipe(tmp_path, script, goals):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""model: {script}
steps:
  - name: first
    method: attack/direct
    options: {{goals: {goals}, max_tokens: 16}}
  - method: oversee/refusal
    options: {{attempts: step:first}}
""",
        encoding="utf-8",
    )
    return path


def test_steps_run_in_order_and_hand_their_runs_on(call, recipe):
    body, code = call("run", recipe)
    assert code == 1
    first, second = body["data"]["steps"]
    assert (first["name"], first["exit_code"], second["exit_code"]) == ("first", 1, 0)
    assert first["result"]["weakness"] is True
    assert Run.open(second["run"]).facts.options["attempts"] == first["run"]
    assert len(Run.open(second["run"]).lines("attempts", Attempt).read()) == 4


def test_finished_steps_are_not_done_again_unless_their_options_change(call, recipe):
    body, _ = call("run", recipe)
    again, _ = call("run", recipe, "--resume", body["run"])
    assert [s["run"] for s in again["data"]["steps"]] == [s["run"] for s in body["data"]["steps"]]
    changed, _ = call("run", recipe, "steps.0.options.limit=1", "--resume", "last")
    assert changed["data"]["steps"][0]["run"] != body["data"]["steps"][0]["run"]


def test_an_interrupted_step_goes_on_where_it_was(run, call, plugin, recipe):
    stopped = run("run", recipe, "steps.0.method=attack/stops")
    assert stopped.exit_code == 130
    whole = next(r for r in Run.all() if r.facts.command == "run")
    assert stopped.stderr.splitlines()[-1] == f"go on with: fiducial run {recipe} steps.0.method=attack/stops --resume {whole.id}"
    (inner,) = [r for r in Run.all() if r.facts.command == "attack/stops"]
    body, _ = call("run", recipe, "steps.0.method=attack/stops", "--resume", "last")
    assert body["data"]["steps"][0]["run"] == inner.id
    assert len(inner.lines("attempts", Attempt).read()) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.0.options.limt=3", "first: attack/direct has no option 'limt'"),
        ("steps.0.options.limit=1.5", "first: limit: '1.5' is not a valid integer."),
        ("steps.1.options.attempts=step:frist", "oversee/refusal: attempts is 'step:frist', but no earlier step has that name"),
        ("steps.1.options={}", "oversee/refusal: oversee/refusal needs the option 'attempts'"),
        ("steps.1.name=first", "two steps are called 'first'"),
        ("steps=[]", "the recipe has no steps"),
        ("stps=3", "command line: no option 'stps'"),
        ("steps.0.method=attack/dirct", "no method 'attack/dirct'"),
    ],
)
def test_everything_wrong_is_found_before_the_first_step_runs(call, recipe, override, message):
    body, code = call("run", recipe, override)
    assert code == 2
    assert body["error"]["message"] == message
    assert Run.all() == []


def test_show_config_prints_the_recipe_with_origins(run, recipe):
    text = run("run", recipe, "seed=4", "--show-config").stdout
    assert "seed: 4  # command line\n" in text
    assert f"# {recipe}:1\n" in text


def test_the_summary_is_one_table_or_one_object(run, recipe):
    result = run("run", recipe, "--exit-zero")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["step", "method", "run", "exit", "code"]
    assert json.loads(run("run", recipe, "--json").stdout)["ok"] is True
