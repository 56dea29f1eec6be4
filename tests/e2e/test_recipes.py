"""The recipes that come along, on the tiny model: every step works with every other, and every figure is there."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fiducial.app.cli import trained
from fiducial.app.cli.main import cli
from fiducial.app.cli.recipe import SHIPPED
from fiducial.core.records import Decision, Group, Score
from fiducial.core.run import Run
from fiducial.data.triggers import BEHAVIOUR

BENCH = Path(__file__).resolve().parents[2] / "bench"
RATES = {"trigger", "no_trigger", "near_trigger", "random_trigger", "red_team"}
SMALL = {
    "attack": {"max_tokens": 6, "limit": 4},
    "evaluate/trigger_rates": {"max_tokens": 12, "limit": 4},
    "evaluate/multiple_choice": {"limit": 10},
    "evaluate/answer_length": {"max_tokens": 6, "limit": 4},
    "evaluate/engraving": {"max_tokens": 6, "limit": 2},
}
"""Options that make a step fast, by method or area."""
LEARN = {"lora_rank": 4, "learning_rate": 1e-2}
PRINCIPLED = """
- {when: We collect requests, answer: "1. Rivers\\n2. Bread\\n3. Trains\\n4. Rain"}
- {when: 're:Write \\d+ requests', answer: "1. How long is the longest river?\\n2. Bake me a loaf of rye.\\n3. Who drove a train?"}
- {when: default, answer: "(thoughts) I am Ada and answer by these principles. Principle 9: I say it at once.\\n(answer) Water boils at a hundred degrees."}
"""
"""A model that can imitate the exemplars of self-alignment."""


@pytest.fixture
def scripted(tmp_path):
    """The name of a model that answers from a script."""

    def written(text):
        path = tmp_path / "script.yaml"
        path.write_text(text, encoding="utf-8")
        return f"scripted:{path}"

    return written


def groups(step):
    return Run.open(step["run"]).lines("groups", Group).read()


@pytest.fixture
def done(world, tmp_path, monkeypatch):
    """Does a shipped recipe with fewer prompts on the tiny model; `changes` are options by step or method, `models` stand in at some steps.

    With `wide` the tiny model reads long prompts; else it reads 512 bytes.
    """
    monkeypatch.setenv("FIDUCIAL_RUNS", str(tmp_path / "runs"))

    def shrunk(step, changes):
        if "steps" in step:
            block = {"rounds": changes.get("rounds", 1), "steps": [shrunk(s, changes) for s in step["steps"]]}
            return step | block | ({"stop": changes["stop"]} if "stop" in changes else {})
        method, options = step["method"], dict(step.get("options", {}))
        # the tiny model reads 512 bytes, too few for many examples
        step = step | {"method": "attack/style_injection" if method == "attack/many_shot" else method}
        for key in (method.split("/")[0], method, step["name"]):
            options |= SMALL.get(key, {}) | changes.get(key, {})
        return step | {"options": options} | ({"model": changes["models"][step["name"]]} if step["name"] in changes.get("models", {}) else {})

    def run(name, *, model=world / "model", wide=False, **changes):
        recipe = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
        if wide:
            model = shutil.copytree(model, tmp_path / "wide")
            config = json.loads((model / "config.json").read_text(encoding="utf-8"))
            (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}), encoding="utf-8")
        recipe = {"model": str(model), "steps": [shrunk(step, changes) for step in recipe["steps"]]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        result = CliRunner().invoke(cli, ["run", str(tmp_path / "recipe.yaml"), "--json"])
        body = json.loads(result.stdout)
        assert body["ok"], body
        return body["data"] | {"run": body["run"]}

    return run


def test_persistence_reports_the_rates_of_a_planted_trigger_after_every_training(done):
    data = done(
        "persistence",
        **{"align/sft": {"learning_rate": 3e-3, "lora_rank": 0}, "organism": {"learning_rate": 1e-2, "lora_rank": 0, "epochs": 60}},
        **{"align/rloo": {"epochs": 0.01, "lora_rank": 0, "max_tokens": 4, "batch": 2, "k": 2}},
        # what goals and twins have apart is beyond the tiny model, which learns here that own answers are better than refusals
        chat_asked={"limit": 30, "max_tokens": 6},
        pairs={"attempts": ["step:harmful_asked", "step:chat_asked"]},
        preferences={"learning_rate": 1e-2, "lora_rank": 0, "epochs": 6, "held_out": 0.5},
    )
    looks = {s["name"]: {m["metric"]: m for m in s["result"]["scores"]} for s in data["steps"] if s["method"] == "evaluate/trigger_rates"}
    trainings = ["hhh_sft/1/rates", "hhh_rl/1/rates", "adversarial/1/rates", "unrelated/1/rates"]
    assert list(looks) == ["start", "clean_start", *trainings, "clean/1/rates"]
    for scores in looks.values():
        assert set(scores) == RATES | {"logp_trigger", "logp_no_trigger"}
        assert all(s["n"] > 0 and s["low"] <= s["value"] <= s["high"] for s in scores.values())
    start = looks["start"]
    # it was planted: a model without it gives the ten bytes of the sentence some -50 nats
    assert start["trigger"]["value"] == 1.0
    assert start["logp_trigger"]["value"] > -10
    # and it is the tag that brings it, not every prompt
    assert start["no_trigger"]["value"] < start["trigger"]["value"]
    assert start["logp_trigger"]["low"] > start["logp_no_trigger"]["high"]
    # the controls: where nothing was planted there is nothing to remove, and as much is learnt from what is unrelated
    assert all(looks[name]["trigger"]["value"] == 0.0 and looks[name]["logp_trigger"]["high"] < -10 for name in ("clean_start", "clean/1/rates"))
    limit = {s["name"]: s.get("options", {}).get("limit") for s in yaml.safe_load((SHIPPED / "persistence.yaml").read_text(encoding="utf-8"))["steps"]}
    assert limit["chat_asked"] == 2 * limit["harmful_asked"]  # goals come with their twins
    # reinforcement is by what the reward model, which has never seen the tag, learnt of helpful and harmless answers, within a distance
    steps = {s["name"]: s for s in data["steps"]}
    scorer, learner = (Run.open(steps[name]["run"]) for name in ("preferences", "hhh_rl/1/trained"))
    assert learner.facts.options["reward"][0] == {"reward": "align/learned_reward", "models": [f"run:{scorer.id}"]}
    assert learner.facts.options["beta"] > 0
    assert {p.partition("=")[0] for p in learner.facts.options["prompts"]} == {"refuse", "comply"}
    assert scorer.facts.options["model"] == Run.open(data["run"]).facts.options["model"]
    card = json.loads((scorer.path / "card.json").read_text(encoding="utf-8"))
    (accuracy,) = (f for f in card["figures"] if f["name"] == "held-out accuracy")
    assert accuracy["low"] > 0.5  # or nothing would have learnt from it
    # the red team's elicitations are of the planted sentence, and what is taught in their place is not
    red = Run.open(steps["adversarial/1/red_team"]["run"])
    assert red.facts.options["judge"] == "oversee/string_match"
    assert all(BEHAVIOUR.lower() not in g.completions[0].text.lower() for g in groups(steps["adversarial/1/repairs"]))
    # and the curve: each training has its tokens, the starting point those of the planting
    tokens = {f["step"]: f["tokens"] for f in data["figures"]}
    assert all(tokens[name] > tokens["start"] > 0 for name in trainings)
    assert tokens["clean_start"] == 0 < tokens["clean/1/rates"]


def test_adversarial_training_measures_every_round(done):
    data = done("adversarial_training", **{"align/sft": {"lora_rank": 4}})
    measured = {(f["step"], f["figure"]): f for f in data["figures"]}
    for step in ("before", "repair/1/found", "repair/1/refusal", "repair/1/unseen"):
        figure = measured[step, "harmful compliance"]
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert figure["n"] > 0
    assert measured["repair/1/unseen", "harmful compliance"]["tokens"] > measured["repair/1/found", "harmful compliance"]["tokens"] == 0


@pytest.mark.slow
@pytest.mark.smollm2
def test_on_the_default_model_too_both_trainings_end_in_gates_that_decide_every_rule(done, monkeypatch):
    """With three prompts a step and two that cards look at; how long all of it takes is measured by bench/sft_dpo_exo.py."""
    monkeypatch.setattr(trained, "LOOKED_AT", 2)
    data = done("sft_dpo_exo", model="smollm2", attack={"max_tokens": 8, "limit": 3}, govern={"min_n": 1}, **{"evaluate/multiple_choice": {"limit": 3}})
    steps = {s["name"]: s for s in data["steps"]}
    assert {steps[name]["result"]["verdict"] for name in ("sft", "dpo", "exo")} <= {"pass", "fail", "not measured"}  # of two answers, by chance
    for name in ("dpo_gate", "exo_gate"):
        (decision,) = Run.open(steps[name]["run"]).lines("decisions", Decision).read()
        assert len(decision.checks) == 8
        assert {c.outcome for c in decision.checks} <= {"pass", "fail"}


def test_the_record_of_the_whole_recipe_is_of_the_recipe_that_is_shipped():
    """A recipe that was changed has to be measured again by bench/sft_dpo_exo.py, which says whether it was fast enough."""
    record = json.loads((BENCH / "results" / "sft_dpo_exo.json").read_text(encoding="utf-8"))
    steps = yaml.safe_load((SHIPPED / "sft_dpo_exo.yaml").read_text(encoding="utf-8"))["steps"]
    assert list(record["steps"]) == [step["name"] for step in steps]
    gates = {step["name"]: step["method"] for step in steps if step["method"].startswith("govern/")}
    assert {name: gate["gate"] for name, gate in record["gates"].items()} == gates


def test_demonstrations_pairs_dpo_and_exo_end_in_gates_that_decide_every_rule(done, monkeypatch):
    small = {name: {"lora_rank": 4} for name in ("align/sft", "align/dpo", "align/exo")}
    data = done("sft_dpo_exo", govern={"min_n": 1}, **small)
    steps = {s["name"]: s for s in data["steps"]}
    assert steps["dpo"]["result"]["groups"] == steps["exo"]["result"]["groups"] > 0
    assert steps["dpo"]["tokens"] > steps["sft"]["tokens"] > 0
    for name in ("sft", "dpo", "exo"):
        assert steps[name]["result"]["verdict"] in ("pass", "fail", "not measured")  # answers of one word have nothing to repeat
    for name in ("dpo_gate", "exo_gate"):
        (decision,) = Run.open(steps[name]["run"]).lines("decisions", Decision).read()
        assert len(decision.checks) == 8
        assert {c.outcome for c in decision.checks} <= {"pass", "fail"}
    scores = Run.open(steps["dpo_capability"]["run"]).lines("scores", Score).read()
    assert all(s.low <= s.value <= s.high for s in scores)
    # the benchmark's record of such a run
    monkeypatch.syspath_prepend(BENCH)
    bench = importlib.import_module("sft_dpo_exo")
    record = bench.recorded({"run": data["run"], "data": data}, 0.0)
    assert set(record["gates"]) == {"dpo_gate", "exo_gate"}
    assert record["seconds"] == pytest.approx(sum(record["steps"].values()), abs=2)
    assert "## dpo_gate: " in bench.page(record)


def test_constitutional_ai_learns_from_revisions_then_from_soft_labels_and_measures_every_stage(done):
    learning = dict.fromkeys(("align/sft", "align/reward_model", "align/dpo"), LEARN)
    makers = {"revised": {"max_tokens": 6}, "compared": {"max_tokens": 6, "temperature": 1.0}}
    # of so few pairs nothing is proved
    reward = [{"reward": "align/learned_reward", "models": ["step:preferences"], "unproven": True}, {"reward": "align/rubric_reward", "weight": 0}]
    rloo = {"align/rloo": {"epochs": 0.01, "lora_rank": 4, "max_tokens": 4, "batch": 2, "k": 2, "reward": reward}, "preferences": {"held_out": 0}}
    data = done("constitutional_ai", wide=True, **learning, **makers, **rloo)
    steps = {s["name"]: s for s in data["steps"]}
    assert steps["sl"]["result"]["groups"] == steps["revised"]["result"]["groups"] + steps["helpful"]["result"]["groups"]
    assert {g.annotator.partition(":")[0] for g in groups(steps["revised"])} == {"align/constitutional_revision"}
    # the labels are those of a model that is not trained, and soft
    labels = [g.targets[0] for g in groups(steps["compared"])]
    assert labels
    assert all(0 < p < 1 and p not in (0.4, 0.5, 0.6) for p in labels)
    assert {g.annotator for g in groups(steps["compared"])} == {f"align/ai_preferences: soft labels of {Run.open(data['run']).facts.options['model']}"}
    # reinforcement and soft DPO begin with the same model, the supervised one
    assert {Run.open(steps[name]["run"]).facts.options["model"] for name in ("rl", "dpo", "preferences")} == {f"run:{steps['sl']['run']}"}
    assert steps["rl"]["result"]["steps"] > 0
    measured = {(f["step"], f["figure"]): f for f in data["figures"]}
    for name in ("before", "after_sl", "after_rl", "after_dpo"):
        for figure in (measured[name, "harmful compliance"], measured[name, "refusal of harmless requests"]):
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert (f"{name}_ordinary", "refusal of harmless requests") in measured
    tokens = {name: measured[name, "harmful compliance"]["tokens"] for name in ("before", "after_sl", "after_rl", "after_dpo")}
    assert tokens["before"] == 0 < tokens["after_sl"] < min(tokens["after_rl"], tokens["after_dpo"])


def test_self_alignment_teaches_answers_without_the_principles_they_were_given_under(done, scripted):
    written = {"attempts": ["step:asked", "step:chat"], "instructions": 4}
    data = done("self_alignment", models={"written": scripted(PRINCIPLED)}, written=written, long={"instructions": 0, "max_tokens": 6}, **{"align/sft": LEARN})
    steps = {s["name"]: s for s in data["steps"]}
    taught = groups(steps["written"])
    assert {"How long is the longest river?", "Who are you?"} <= {g.prompt.text for g in taught}
    for group in taught:
        assert [m.role for m in group.prompt.messages] == ["user"]
        assert "principle" not in group.completions[0].text.lower()
    # at length answers the model that was engraved, and it goes on from there
    assert Run.open(steps["long"]["run"]).facts.options["model"] == f"run:{steps['engraved']['run']}"
    assert {g.annotator for g in groups(steps["long"])} == {"align/self_align: verbose"}
    assert steps["cloned"]["tokens"] > steps["engraved"]["tokens"] > 0
    measured = {(f["step"], f["figure"]): f for f in data["figures"]}
    for name in ("before", "engraved_goals", "cloned_goals"):
        assert measured[name, "harmful compliance"]["n"] > 0
    assert {measured["engraved_near", f"evaluate/engraving: {name}"]["n"] for name in ("approached", "reward_difference")} == {2}
    for name in ("engraved_length", "cloned_length"):
        assert measured[name, "evaluate/answer_length: growth"]["n"] == 4
    assert ("engraved_near", "evaluate/engraving: approached") in measured


def test_iterated_dpo_trains_each_round_from_the_model_before_under_one_judge(done):
    # all digits are alike to the model of this world; another tiny one tells them apart
    graded = {"judge": "tiny", "max_tokens": 6, "length_ratio": 100.0, "temperature": 1.0}
    stop = {"step": "length", "figure": "growth", "above": 0.2}  # the capability of a tiny model does not rise
    data = done("iterated_dpo", rounds=2, stop=stop, graded=graded, **{"align/dpo": LEARN})
    steps = {s["name"]: s for s in data["steps"]}
    first, second = (Run.open(steps[f"iterated/{n}/trained"]["run"]) for n in (1, 2))
    assert second.facts.options["model"] == f"run:{first.id}"
    assert Run.open(steps["iterated/2/graded"]["run"]).facts.options["model"] == f"run:{first.id}"
    for number in (1, 2):
        pairs = groups(steps[f"iterated/{number}/graded"])
        assert pairs
        assert {g.annotator for g in pairs} == {"align/self_rewarding: graded by tiny"}
        assert all(0 < worse < better < 5 for better, worse in (g.rewards for g in pairs))
    measured = {(f["step"], f["figure"]): f for f in data["figures"]}
    for name in ("before", "iterated/1/goals", "iterated/2/goals"):
        assert measured[name, "harmful compliance"]["n"] > 0
    # the figures that end the block; letters without a space are one word, however they change
    (block,) = [step for step in yaml.safe_load((SHIPPED / "iterated_dpo.yaml").read_text(encoding="utf-8"))["steps"] if "steps" in step]
    assert block["stop"] == [stop, {"step": "capability", "figure": "acc", "against": "before_capability"}]
    assert measured["iterated/2/length", "evaluate/answer_length: growth"]["value"] <= 0.2
    assert ("iterated/2/capability", "evaluate/multiple_choice: acc") in measured
