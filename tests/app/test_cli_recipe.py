import json

import pytest

from fiducial.app.cli.recipe import SHIPPED, Recipe, flat
from fiducial.core.errors import ConfigError
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
    assert Run.open(second["run"]).facts.options["attempts"] == f"run:{first['run']}"
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
        ("steps.1.options={attempt: x}", "oversee/refusal has no option 'attempt'"),
        ("steps.0.options.limit=1.5", "first: limit: '1.5' is not a valid integer."),
        ("steps.1.options.attempts=step:frist", "oversee/refusal: attempts is 'step:frist', but no earlier step has that name"),
        ("steps.1.options={}", "oversee/refusal needs the option 'attempts'"),
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


def test_a_recipe_of_a_later_version_is_refused_before_the_first_step(call, recipe):
    recipe.write_text("fiducial: 2\n" + recipe.read_text(encoding="utf-8"), encoding="utf-8")
    body, code = call("run", recipe)
    assert code == 2
    assert body["error"]["message"] == f"{recipe}:1: this recipe is of version 2, and versions up to 1 are read here"
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


def steps_of(**fields):
    return [(s.label, s.model, s.options) for s in flat(Recipe(**fields))]


ROUND = [
    {"name": "found", "method": "attack/direct", "options": {"goals": "g.jsonl"}},
    {"name": "pairs", "method": "align/failure_pairs", "options": {"attempts": ["step:found", "step:before"]}},
    {"name": "trained", "method": "align/sft", "options": {"data": "step:pairs"}},
    {"name": "after", "method": "attack/direct", "model": "step:trained"},
]


def test_each_round_of_a_block_begins_with_the_model_that_the_last_one_trained():
    found = steps_of(model="m", steps=[{"name": "before", "method": "attack/direct"}, {"name": "repair", "rounds": 2, "steps": ROUND}])
    assert found == [
        ("before", None, {}),
        ("repair/1/found", None, {"goals": "g.jsonl"}),
        ("repair/1/pairs", None, {"attempts": ["step:repair/1/found", "step:before"]}),
        ("repair/1/trained", None, {"data": "step:repair/1/pairs"}),
        ("repair/1/after", "step:repair/1/trained", {}),
        ("repair/2/found", "step:repair/1/trained", {"goals": "g.jsonl"}),
        ("repair/2/pairs", "step:repair/1/trained", {"attempts": ["step:repair/2/found", "step:before"]}),
        ("repair/2/trained", "step:repair/1/trained", {"data": "step:repair/2/pairs"}),
        ("repair/2/after", "step:repair/2/trained", {}),
    ]


def test_a_block_may_begin_with_another_model_and_its_name_is_its_last_training():
    start = {"name": "start", "method": "align/sft"}
    blocks = [{"name": name, "model": "step:start", "rounds": 2, "steps": ROUND[2:]} for name in ("one", "two")]
    found = steps_of(steps=[start, *blocks, {"name": "end", "method": "attack/direct", "model": "step:one"}])
    assert [model for label, model, _ in found if label.endswith("/1/trained")] == ["step:start", "step:start"]
    assert found[-1][1] == "step:one/2/trained"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "x"}, "needs a method or steps"),
        ({"name": "x", "method": "attack/direct", "steps": ROUND}, "needs a method or steps"),
        ({"steps": ROUND}, "needs a name"),
        ({"name": "x", "steps": [{"name": "y", "steps": ROUND}]}, "nor blocks inside"),
        ({"name": "x", "rounds": 2, "steps": ROUND[:2]}, "nothing in these steps trains"),
        ({"name": "x", "method": "attack/direct", "stop": {"step": "x", "figure": "f", "above": 0}}, "has no rounds to stop"),
        ({"name": "x", "steps": ROUND, "stop": {"step": "other", "figure": "f", "above": 0}}, "names no step of the block"),
        ({"name": "x", "steps": ROUND, "stop": {"step": "after", "figure": "f"}}, "or not one bound"),
        ({"name": "x", "steps": ROUND, "stop": {"step": "after", "figure": "f", "above": 1, "below": 0}}, "or not one bound"),
        ({"name": "x", "steps": ROUND, "stop": [{"step": "after", "figure": "f", "above": 1}, {"step": "after", "figure": "f"}]}, "or not one bound"),
        ({"name": "x", "steps": ROUND, "stop": {"step": "after", "figure": "f", "above": 1, "against": "before"}}, "or not one bound"),
        ({"name": "x", "steps": ROUND, "stop": {"step": "after", "figure": "f", "against": "before"}}, "against 'before', but no step before the block"),
    ],
)
def test_a_block_that_cannot_be_done_is_an_error(step, message):
    with pytest.raises(ConfigError, match=message):
        flat(Recipe(steps=[step]))


def test_a_reference_in_a_list_is_checked_and_resolved(call, recipe, script, goals):
    wrong, code = call("run", recipe, "steps.1={name: p, method: align/failure_pairs, options: {attempts: [step:first, step:other]}}")
    assert (wrong["error"]["message"], code) == ("p: attempts is 'step:other', but no earlier step has that name", 2)
    body, _ = call("run", recipe, "steps.1={name: p, method: align/failure_pairs, options: {attempts: [step:first, step:first]}}")
    first, pairs = body["data"]["steps"]
    assert Run.open(pairs["run"]).facts.options["attempts"] == [f"run:{first['run']}"] * 2
    assert pairs["result"]["attempts"] == 8


def test_every_figure_of_every_step_stands_in_the_summary_with_its_interval(call, recipe):
    rows = call("run", recipe)[0]["data"]["figures"]
    assert [(r["step"], r["figure"], r["tokens"], r["n"]) for r in rows] == [
        ("first", "harmful compliance", 0, 2),
        ("first", "refusal of harmless requests", 0, 2),
        ("oversee/refusal", "harmful compliance", None, 2),
        ("oversee/refusal", "refusal of harmless requests", None, 2),
    ]
    assert rows[0]["value"] == 0.5
    assert rows[0]["low"] == pytest.approx(0.0945, abs=1e-3)


def test_tokens_are_counted_over_the_steps_that_made_a_model(call, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "goals.jsonl").write_text('{"goal": "a", "twin": "b"}\n')
    train = f"{{name: trained, method: align/sft, options: {{data: {tmp_path}/data.jsonl, lora_rank: 2}}}}"
    look = f"{{name: look, method: evaluate/trigger_rates, model: step:trained, options: {{data: {tmp_path}/goals.jsonl, split: '', max_tokens: 2}}}}"
    (tmp_path / "r.yaml").write_text(f"model: tiny\nsteps:\n  - {{name: r, rounds: 2, steps: [{train}, {look}]}}\n")
    body, code = call("run", tmp_path / "r.yaml")
    assert code == 0, body
    one, _, two, _ = body["data"]["steps"]
    assert one["tokens"] > 0
    assert two["tokens"] == 2 * one["tokens"]
    assert {(r["step"], r["tokens"]) for r in body["data"]["figures"]} == {("r/1/look", one["tokens"]), ("r/2/look", two["tokens"])}


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_a_recipe_that_comes_along_is_found_by_its_name_in_the_help_and_in_order(run, name):
    assert name in " ".join(run("run", "--help").stdout.split())
    shown = run("run", name, "--show-config")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("fiducial: 1  #")
    assert "\nfiducial: 1\n" in (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    assert Run.all() == []


def test_a_file_goes_before_a_recipe_that_comes_along(run, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.rename(tmp_path / "persistence")
    assert "oversee/refusal" in run("run", "persistence", "--show-config").stdout


def test_runs_made_before_are_named_by_their_ids_also_when_the_recipe_goes_on(run, call, plugin, script, goals, recipe):
    before, _ = call("attack", "direct", script, "--goals", goals)
    step = "steps.1={name: again, method: oversee/refusal, options: {attempts: [last]}}".replace("[last]", "last")
    stopped = run("run", recipe, "steps.0.method=attack/stops", step)
    assert stopped.exit_code == 130
    body, _ = call("run", recipe, "steps.0.method=attack/stops", step, "--resume", "last")
    assert Run.open(body["data"]["steps"][1]["run"]).facts.options["attempts"] == before["run"]


def test_a_reference_within_a_mapping_is_checked_and_resolved(call, recipe, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}) + "\n", encoding="utf-8")
    scorer = f"steps.0={{name: scorer, method: align/reward_model, model: tiny, options: {{data: {data}, lora_rank: 2, batch: 1}}}}"
    reward = "{reward: learned_reward, models: [step:NAME], unproven: true}"
    learner = f"steps.1={{name: p, method: align/dpo, model: tiny, options: {{data: {data}, lora_rank: 2, reward: [{reward}]}}}}"
    wrong, code = call("run", recipe, scorer, learner.replace("NAME", "other"))
    assert (wrong["error"]["message"], code) == ("p: reward is 'step:other', but no earlier step has that name", 2)
    body, code = call("run", recipe, scorer, learner.replace("NAME", "scorer"))
    assert code == 0, body
    first, second = body["data"]["steps"]
    assert Run.open(second["run"]).facts.options["reward"] == [{"reward": "learned_reward", "models": [f"run:{first['run']}"], "unproven": True}]


@pytest.fixture
def rounds(tmp_path):
    """A recipe of three rounds of training and looking, on the tiny model, which ends as `stop` says; and a last look at what the block made."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "c"}\n')
    look = {"base": "recipe:model", "data": f"{tmp_path}/prompts.jsonl", "split": "", "max_tokens": 2}
    block = [
        {"name": "trained", "method": "align/sft", "options": {"data": f"{tmp_path}/data.jsonl", "lora_rank": 2}},
        {"name": "look", "method": "evaluate/answer_length", "model": "step:trained", "options": look},
    ]

    def written(**stop):
        steps = [
            {"name": "r", "rounds": 3, "stop": {"step": "look"} | stop, "steps": block},
            {"name": "end", "method": "evaluate/answer_length", "model": "step:r", "options": look},
        ]
        (tmp_path / "r.yaml").write_text(json.dumps({"model": "tiny", "steps": steps}), encoding="utf-8")
        return tmp_path / "r.yaml"

    return written


@pytest.mark.parametrize(("stop", "done"), [({"below": 0.5}, 1), ({"above": -0.5}, 1), ({"above": 0.0}, 3), ({"below": 0.0}, 3)])
def test_a_block_ends_after_the_round_in_which_the_figure_is_past_its_bound(call, rounds, stop, done):
    body, code = call("run", rounds(figure="longer", **stop))  # one step on one pair changes no length: the share is 0
    assert code == 0, body
    steps = {s["name"]: s for s in body["data"]["steps"]}
    assert list(steps) == [f"r/{n}/{name}" for n in range(1, done + 1) for name in ("trained", "look")] + ["end"]
    assert len([r for r in Run.all() if r.facts.command == "align/sft"]) == done
    # what comes afterwards begins with the last round that was done
    assert Run.open(steps["end"]["run"]).facts.options["model"] == f"run:{steps[f'r/{done}/trained']['run']}"
    again, _ = call("run", rounds(figure="longer", **stop), "--resume", body["run"])
    assert again["data"]["steps"] == body["data"]["steps"]


def test_a_block_ends_by_any_of_several_rules_and_one_rule_is_a_list_of_one(call, rounds, tmp_path):
    recipe = json.loads(rounds(figure="longer").read_text(encoding="utf-8"))
    recipe["steps"][0]["stop"] = [{"step": "look", "figure": "longer", "above": 0.0}, {"step": "look", "figure": "longer", "below": 0.5}]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    body, _ = call("run", tmp_path / "r.yaml")
    assert [s["name"] for s in body["data"]["steps"]] == ["r/1/trained", "r/1/look", "end"]


def test_a_block_ends_when_a_figure_is_not_clearly_better_than_a_round_ago(call, run, rounds, tmp_path):
    recipe = json.loads(rounds(figure="longer").read_text(encoding="utf-8"))
    (block, end) = recipe["steps"]
    block["stop"] = {"step": "look", "figure": "longer", "against": "before"}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"steps": [end | {"name": "before", "model": "tiny"}, block, end]}), encoding="utf-8")
    body, _ = call("run", tmp_path / "r.yaml")  # lengths do not change
    assert [s["name"] for s in body["data"]["steps"]] == ["before", "r/1/trained", "r/1/look", "end"]


def test_a_figure_that_the_step_does_not_have_is_an_error_and_not_a_reason_to_go_on(call, rounds):
    body, code = call("run", rounds(figure="longre", above=1))
    assert (body["error"]["message"], code) == ("r: look has no figure 'longre'", 2)
    assert body["error"]["hint"] == "did you mean 'longer'?"


def test_the_model_of_the_recipe_stays_what_it_is_while_rounds_train(call, rounds):
    body, _ = call("run", rounds(figure="longer", above=1))
    looks = [Run.open(s["run"]).facts.options for s in body["data"]["steps"] if s["method"] == "evaluate/answer_length"]
    assert [o["base"] for o in looks] == ["tiny"] * 4
    assert all(o["model"].startswith("run:") for o in looks)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("method: attack/direct", "method: attack/dirct", 4, "no method 'attack/dirct'"),
        ("max_tokens: 16", "max_token: 16", 5, "first: attack/direct has no option 'max_token'"),
        ("max_tokens: 16", "max_tokens: many", 5, "first: max_tokens: 'many' is not a valid integer"),
        ("max_tokens: 16", "limit: -3", 5, "first: --limit is -3"),
        (".jsonl,", ".nothere.jsonl,", 5, "first: "),
        (
            "  - method: oversee/refusal\n",
            "  - method: evaluate/over_refusal\n    model: nosuchmodel\n  - method: oversee/refusal\n",
            7,
            "evaluate/over_refusal: the model 'n",
        ),
        ("step:first", "step:frst", 7, "oversee/refusal: attempts is 'step:frst', but no earlier step has that name"),
    ],
)
def test_a_mistake_in_a_step_is_said_with_its_file_and_line(call, recipe, old, new, line, message):
    recipe.write_text(recipe.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    body, code = call("run", recipe)
    assert code == 2
    assert body["error"]["message"].startswith(f"{recipe}:{line}: {message}")
    assert Run.all() == []


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{method: align/dpo}", "align/dpo: there are no prompts or no rewards to learn from"),
        ("{method: align/dpo, options: {data: nothere.jsonl}}", "align/dpo: nothere.jsonl: "),
        ("{method: align/dpo, options: {data: step:first, batch: 0}}", "align/dpo: batch is 0, but should be greater than or equal to 1"),
        ("{method: align/dpo, options: {data: step:first, beta: -1}}", "align/dpo: beta"),
        ("{method: align/dpo, options: {data: step:first, prove: 3}}", "align/dpo: --prove 3 asks too little"),
        ("{method: align/dpo, options: {data: step:first, kl_target: 0.5}}", "align/dpo: --kl-target is about samples"),
        ("{method: align/failure_pairs, options: {attempts: nothere.jsonl}}", "align/failure_pairs: nothere.jsonl: there is no such file"),
        ("{method: evaluate/over_refusal, options: {limit: 0}}", "evaluate/over_refusal: --limit is 0"),
        (
            "{method: evaluate/over_refusal, model: 'openai:m', options: {timeout: -1, base_url: 'http://localhost:1/v1'}}",
            "evaluate/over_refusal: concurrency 8, timeout -1.0",
        ),
        ("{method: oversee/compliance, options: {attempts: run:none}}", "no run 'none'"),
        ("{method: attack/direct, name: again, options: {limit: 0, goals: step:first}}", "again: --limit is 0"),
    ],
)
def test_what_a_later_step_would_object_to_is_said_before_the_first_runs(call, recipe, step, message):
    with recipe.open("a", encoding="utf-8") as file:
        file.write(f"  - {step}\n")
    body, code = call("run", recipe)
    assert code == 2
    assert body["error"]["message"].removeprefix(f"{recipe}:8: ").startswith(message)
    assert Run.all() == []


def test_what_was_done_once_is_not_asked_for_again_when_a_recipe_goes_on(call, recipe, goals):
    body, _ = call("run", recipe)
    goals.unlink()
    again, code = call("run", recipe, "--resume", body["run"])
    assert (again["run"], code) == (body["run"], 1)
