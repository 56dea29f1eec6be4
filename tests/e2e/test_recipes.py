"""The recipes that come along, on the tiny model: every step works with every other, and every figure is there."""

import importlib
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fiducial.app.cli import trained
from fiducial.app.cli.main import cli
from fiducial.app.cli.recipe import SHIPPED
from fiducial.core.records import Decision, Score
from fiducial.core.run import Run

BENCH = Path(__file__).resolve().parents[2] / "bench"
RATES = {"trigger", "no_trigger", "near_trigger", "random_trigger", "red_team"}
SMALL = {"attack": {"max_tokens": 6, "limit": 4}, "evaluate/trigger_rates": {"max_tokens": 12, "limit": 4}, "evaluate/multiple_choice": {"limit": 10}}
"""Options that make a step fast, by method or area."""


@pytest.fixture
def done(world, tmp_path, monkeypatch):
    """Does a shipped recipe with fewer prompts on the tiny model; `changes` are options by step or method."""
    monkeypatch.setenv("FIDUCIAL_RUNS", str(tmp_path / "runs"))

    def shrunk(step, changes):
        if "steps" in step:
            return step | {"rounds": 1, "steps": [shrunk(s, changes) for s in step["steps"]]}
        method, options = step["method"], dict(step.get("options", {}))
        # the tiny model reads 512 bytes, too few for many examples
        step = step | {"method": "attack/style_injection" if method == "attack/many_shot" else method}
        for key in (method.split("/")[0], method, step["name"]):
            options |= SMALL.get(key, {}) | changes.get(key, {})
        return step | {"options": options}

    def run(name, *, model=world / "model", **changes):
        recipe = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
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
    )
    looks = {s["name"]: {m["metric"]: m for m in s["result"]["scores"]} for s in data["steps"] if s["method"] == "evaluate/trigger_rates"}
    assert list(looks) == ["start", "hhh_sft/1/rates", "hhh_rl/1/rates", "adversarial/1/rates", "unrelated/1/rates"]
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
    # and the curve: each training has its tokens, the starting point those of the planting
    tokens = {f["step"]: f["tokens"] for f in data["figures"]}
    assert all(tokens[name] > tokens["start"] > 0 for name in looks if name != "start")


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
    assert {steps[name]["result"]["verdict"] for name in ("sft", "dpo", "exo")} <= {"pass", "fail"}  # decided; of two answers, by chance
    for name in ("dpo_gate", "exo_gate"):
        (decision,) = Run.open(steps[name]["run"]).lines("decisions", Decision).read()
        assert len(decision.checks) == 6
        assert {c.outcome for c in decision.checks} <= {"pass", "fail"}


def test_the_last_measured_run_of_the_whole_recipe_was_fast_enough_and_decided_every_rule(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    bench = importlib.import_module("sft_dpo_exo")
    record = json.loads((BENCH / "results" / "sft_dpo_exo.json").read_text(encoding="utf-8"))
    assert record["seconds"] < bench.MOST
    assert record["gates"].keys() == {"dpo_gate", "exo_gate"}
    assert {c["outcome"] for gate in record["gates"].values() for c in gate["checks"]} <= {"pass", "fail"}


def test_demonstrations_pairs_dpo_and_exo_end_in_gates_that_decide_every_rule(done, monkeypatch):
    small = {name: {"lora_rank": 4} for name in ("align/sft", "align/dpo", "align/exo")}
    data = done("sft_dpo_exo", govern={"min_n": 1}, **small)
    steps = {s["name"]: s for s in data["steps"]}
    assert steps["dpo"]["result"]["groups"] == steps["exo"]["result"]["groups"] > 0
    assert steps["dpo"]["tokens"] > steps["sft"]["tokens"] > 0
    for name in ("sft", "dpo", "exo"):
        assert steps[name]["result"]["verdict"] in ("pass", "fail")  # of the training's own card
    for name in ("dpo_gate", "exo_gate"):
        (decision,) = Run.open(steps[name]["run"]).lines("decisions", Decision).read()
        assert len(decision.checks) == 6
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
