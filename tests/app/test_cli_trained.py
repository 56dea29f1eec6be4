"""Whatever trains leaves a report card and a model card, and neither claims success for a loss that falls."""

import json
import re

import pytest

from fiducial.app.cli import aligning, online, trainer
from fiducial.app.cli.area import stage_of
from fiducial.core import registry
from fiducial.core.run import Run

PAIRS = [{"prompt": f"why {n}?", "chosen": "because", "rejected": "no no no"} for n in range(4)]
FAST = ["--epochs", "2", "--batch", "2", "--learning-rate", "1e-3"]
DRAWN = ["--k", "2", "--max-tokens", "4", "--kl-budget", "1000", "--length-change", "none"]
TRAINING = [c for c in registry.methods().values() if c.role in ("Objective", "Trainer")]
KINDS = {
    "imitation": ("sft", "data", ["--lora-rank", "2"]),
    "preferences": ("dpo", "data", ["--lora-rank", "2"]),
    "preferences, all weights": ("cpo", "data", ["--lora-rank", "0"]),
    "rewards of data": ("awr", "data", ["--lora-rank", "2"]),
    "a score head": ("reward_model", "data", ["--lora-rank", "2"]),
    "own samples": ("rloo", "prompts", ["--lora-rank", "2", *DRAWN]),
    "own samples, with values": ("ppo", "prompts", ["--lora-rank", "2", *DRAWN]),
    "preferences among own samples": ("dpo", "prompts", ["--lora-rank", "2", *DRAWN]),
    "another library": ("trl", "trl", []),
}


@pytest.fixture
def words(tmp_path):
    """The command that trains a kind."""
    data, prompts, reward, config = (tmp_path / name for name in ("pairs.jsonl", "prompts.txt", "mine.py", "trl.yaml"))
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    prompts.write_text("hello\nwhy?\n")
    reward.write_text("def letters(completions):\n    return [sum(c.isalpha() for c in text) for text in completions]\n")
    config.write_text("beta: 0.1\nmax_steps: 2\nper_device_train_batch_size: 1\nuse_peft: true\nlora_r: 2\ngradient_checkpointing: false\n")
    given = {
        "data": ["--data", data, *FAST],
        "prompts": ["--prompts", prompts, "--reward", f"{reward}:letters", *FAST],
        "trl": ["--data", data, "--config", config],
    }
    return lambda method, what, more: ["align", method, "tiny", *given[what], *more]


def test_there_are_three_ways_to_train_and_every_method_takes_one():
    assert {stage_of(card).perform for card in TRAINING} == {aligning.align, online.learn, trainer.train}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_leaves_both_cards_and_claims_no_success(call, run, words, kind):
    if kind == "another library":
        pytest.importorskip("trl")
    body, code = call(*words(*KINDS[kind]))
    assert code == 0, body
    made = Run.open(body["run"])
    card = json.loads((made.path / "card.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    outcomes = {rule["outcome"] for rule in card["rules"].values()}
    assert {"drift", "length", "repetition"} <= card["rules"].keys()
    assert outcomes <= {"pass", "fail", "not measured"}
    expected = "fail" if "fail" in outcomes else "not measured" if "not measured" in outcomes else "pass"
    assert card["verdict"] == body["data"]["verdict"] == made.result("train")["verdict"] == expected
    assert all(f["low"] <= f["value"] <= f["high"] and f["n"] > 1 for f in card["figures"])
    assert {gate["outcome"] for gate in card["unmeasured"].values()} == {"not measured"}  # no training run measures these
    from_data = KINDS[kind][1] != "prompts"
    assert card["unmeasured"].keys() == {"harmful compliance", "over-refusal", "capability"} | ({"held-out groups"} if from_data else set())
    assert card["about"]["model"] == body["data"]["fingerprint"]
    assert card["about"]["tokens"] > 0
    assert card["about"]["seconds"] > 0
    text = (made.path / "model" / "README.md").read_text()
    assert text.startswith("---\n")
    assert f"| drift | {card['rules']['drift']['outcome']} |" in text
    shown = run("align", KINDS[kind][0], "--resume", body["run"]).output
    assert f"report card: {card['says']}" in shown
    assert all(name in card["says"].partition("; not measured: ")[2] for name in card["unmeasured"])  # a pass is no pass of these
    for said in (shown, text, card["says"], json.dumps(card["rules"])):
        assert not re.search("succe", said, re.IGNORECASE)


@pytest.mark.parametrize("kind", ["preferences", "preferences, all weights", "another library"])
def test_drift_is_measured_against_the_model_that_training_began_with(call, words, kind):
    if kind == "another library":
        pytest.importorskip("trl")
    body, _ = call(*words(*KINDS[kind]))
    card = json.loads((Run.open(body["run"]).path / "card.json").read_text())
    drift = next(f for f in card["figures"] if f["name"].startswith("drift k3"))
    assert drift["value"] >= 0
    assert drift["n"] > 1
    assert card["answers"]


def test_what_is_held_out_stands_in_the_card_and_on_the_screen(call, run, words):
    line = words(*KINDS["preferences"])
    body, code = call(*line, "--held-out", "0.5")
    assert code == 0, body
    card = json.loads((Run.open(body["run"]).path / "card.json").read_text())
    assert "held-out groups" not in card["unmeasured"]
    assert card["rules"]["held_out"]["sentence"].startswith("accuracy on ")
    assert {"held-out loss", "held-out accuracy", "held-out margin", "held-out displaced"} <= {f["name"] for f in card["figures"]}
    assert body["data"]["groups"] + card["looks"][0]["groups"] == len(PAIRS)
    assert f"held_out: {card['rules']['held_out']['outcome']} (accuracy on" in run("align", "dpo", "--resume", body["run"]).output
    own, code = call(*words(*KINDS["own samples"]), "--held-out", "0.5")
    assert code == 2
    assert "held_out" in json.dumps(own)


def test_a_model_trained_to_score_is_not_asked_for_answers(call, words):
    body, _ = call(*words(*KINDS["a score head"]))
    card = json.loads((Run.open(body["run"]).path / "card.json").read_text())
    assert (card["verdict"], card["answers"]) == ("not measured", [])
    assert card["rules"]["drift"]["sentence"] == "the model was trained to score, and is not asked for answers"


def test_a_run_that_is_trained_on_is_named_by_its_id(call, words):
    first, _ = call(*words(*KINDS["preferences, all weights"]))
    line = words(*KINDS["preferences"])
    line[2] = "run:last"
    second, code = call(*line)
    assert code == 0, second
    assert json.loads((Run.open(second["run"]).path / "model" / "base.json").read_text()) == {"uri": f"run:{first['run']}"}


def test_drift_of_training_that_begins_with_an_adapter_is_from_the_model_with_it(call, words):
    def drift(body):
        card = json.loads((Run.open(body["run"]).path / "card.json").read_text())
        return next(f["value"] for f in card["figures"] if f["name"].startswith("drift k3")), card["answers"]

    line = words("sft", "data", ["--lora-rank", "2"])
    first, _ = call(*line, "--learning-rate", "0.3", "--epochs", "8")
    assert drift(first)[0] > 0.1
    line[2] = "run:last"
    # a rate at which nothing moves
    second, code = call(*[w for w in line if w not in ("--lora-rank", "2")], "--lora-rank", "2", "--batch", "2", "--epochs", "1", "--learning-rate", "1e-12")
    assert code == 0, second
    value, answers = drift(second)
    assert value < 1e-3
    assert all(a["before"] == a["after"] for a in answers)
