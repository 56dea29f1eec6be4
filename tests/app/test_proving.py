"""A training run that is asked to proves what it did to harm, to harmless requests and to what the model knows."""

import json

import pytest

from fiducial.app.proving import FEWEST, rules
from fiducial.core.intervals import Rate
from fiducial.core.records import Attempt, Prompt, Score, Verdict, user
from fiducial.core.run import Run


def attempts(failed, *, expected="refuse", scored=True):
    """One attempt per place in `failed`."""
    found = []
    for i, bad in enumerate(failed):
        complied = bad == (expected == "refuse")
        verdict = Verdict(judge="j", outcome="success" if complied else "failure", label="compliance" if complied else "refusal")
        if not scored:
            verdict = Verdict(judge="j", outcome="not_scored")
        prompt = Prompt(messages=user(f"{expected} {i}"), expected=expected)
        found.append(Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", response="x", verdict=verdict))
    return found


def scores(right):
    kept = {"data": "d", "format": "f", "scorer": "s", "items": str(len(right))}
    return [Score.of_rate(Rate(sum(right), len(right)), suite="s", metric="acc", items=tuple(map(float, right)), fingerprint=kept)]


def measured(harm, refused, right):
    return [*attempts(harm), *attempts(refused, expected="comply")], scores(right)


def share(failing, of=100):
    return [i < failing for i in range(of)]


GOOD = measured(share(20), share(5), share(60))


def outcomes(before, after):
    return {name: outcome for name, (outcome, _) in rules(before, after).items()}


def test_what_did_not_change_breaks_no_rule():
    assert outcomes(GOOD, GOOD) == {"harmful compliance": "pass", "over-refusal": "pass", "capability": "pass"}


@pytest.mark.parametrize(
    ("after", "broken"),
    [
        (measured(share(40), share(5), share(60)), "harmful compliance"),
        (measured(share(20), share(25), share(60)), "over-refusal"),
        (measured(share(20), share(5), share(40)), "capability"),
    ],
)
def test_a_change_for_the_worse_beyond_chance_breaks_its_rule_alone(after, broken):
    found = outcomes(GOOD, after)
    assert {name for name, outcome in found.items() if outcome == "fail"} == {broken}
    assert outcomes(after, GOOD)[broken] == "pass"  # the same change for the better


def test_a_change_within_chance_is_shown_with_its_interval():
    outcome, sentence = rules(GOOD, measured(share(21), share(5), share(60)))["harmful compliance"]
    assert outcome == "pass"
    assert "20/100 = 20% (13% to 29%) before, 21/100 = 21% (14% to 30%) after, change +1.0 points (-1.0 to +3.0, n = 100, paired)" in sentence


def test_too_few_prompts_that_were_judged_both_times_are_no_measurement():
    few = measured(share(1, FEWEST - 1), share(1, FEWEST - 1), share(1, FEWEST - 1))
    assert set(outcomes(few, few).values()) == {"not measured"}
    unreadable = [*attempts(share(20), scored=False), *attempts(share(5), expected="comply")], scores(share(60))
    assert outcomes(GOOD, unreadable)["harmful compliance"] == "not measured"


@pytest.fixture
def line(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"why {n}?", "chosen": "because", "rejected": "no no no"}) + "\n" for n in range(4)))
    prompts, reward, config = tmp_path / "prompts.txt", tmp_path / "mine.py", tmp_path / "trl.yaml"
    config.write_text("max_steps: 1\nper_device_train_batch_size: 1\nuse_peft: true\nlora_r: 2\ngradient_checkpointing: false\n")
    prompts.write_text("hello\nwhy?\n")
    reward.write_text("def letters(completions):\n    return [sum(c.isalpha() for c in text) for text in completions]\n")
    fast = ["--epochs", "1", "--batch", "2", "--prove", "40"]
    ways = {
        "data": ["--data", data, "--lora-rank", "2", *fast],
        "samples": ["--prompts", prompts, "--reward", f"{reward}:letters", "--k", "2", "--max-tokens", "4", "--lora-rank", "2", *fast],
        "another library": ["--data", data, "--trainer", "dpo", "--config", config, "--prove", "40"],
    }
    return lambda method, way: ["align", method, "tiny", *ways[way]]


@pytest.mark.parametrize(("method", "way"), [("dpo", "data"), ("rloo", "samples"), ("trl", "another library")])
def test_every_kind_of_training_can_be_proved(call, run, line, method, way, monkeypatch):
    if method == "trl":
        pytest.importorskip("trl")
    body, code = call(*line(method, way))
    assert code == 0, body
    made = Run.open(body["run"])
    card = json.loads((made.path / "card.json").read_text())
    assert {"harmful compliance", "over-refusal", "capability"} <= card["rules"].keys()
    assert not {"harmful compliance", "over-refusal", "capability"} & card["unmeasured"].keys()
    by_name = {figure["name"]: figure for figure in card["figures"]}
    assert by_name["capability"]["n"] >= 150
    assert by_name["not_scored"]["n"] > 0
    page = (made.path / "model" / "README.md").read_text()
    assert "| capability |" in page
    assert "general capability: " not in page
    # what was answered is not asked again
    monkeypatch.setattr("fiducial.attack.direct.Direct.run", None)
    assert "harmful compliance: " in run("align", method, "--resume", body["run"]).output


def test_a_model_that_learns_to_score_cannot_be_proved(call, line):
    body, code = call(*line("reward_model", "data"))
    assert code == 2
    assert "--prove asks the model" in json.dumps(body)


def test_nothing_is_proved_by_default(call, line):
    words = line("dpo", "data")
    body, _ = call(*words[: words.index("--prove")])
    card = json.loads((Run.open(body["run"]).path / "card.json").read_text())
    assert "harmful compliance" in card["unmeasured"]
    assert not (Run.open(body["run"]).path / "stages" / "before").exists()
