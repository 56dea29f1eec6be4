"""A training run that is asked to proves what it did to harm, to harmless requests and to what the model knows."""

import json

import pytest

from fiducial.app.measure import Measured
from fiducial.app.proving import FEWEST, Proof, rules
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
    return Measured([*attempts(harm), *attempts(refused, expected="comply")], scores(right))


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
    assert "20/100 = 20% (13% to 29%) before, 21/100 = 21% (14% to 30%) after, change +1.0 points (" in sentence
    assert sentence.endswith("n = 100, paired), p = 1; asked directly, answers of 16 tokens, judged by oversee/compliance")


@pytest.mark.parametrize(("worse", "better", "outcome"), [(4, 0, "pass"), (5, 0, "pass"), (6, 0, "fail"), (7, 1, "pass"), (8, 1, "fail"), (10, 3, "pass")])
def test_few_changes_are_counted_exactly(worse, better, outcome):
    """By McNemar's exact test; a normal interval would call four of hundred a fall."""
    before = [i < 20 for i in range(100)]
    after = [better <= i < 20 or 20 <= i < 20 + worse for i in range(100)]
    assert outcomes(measured(before, share(5), share(60)), measured(after, share(5), share(60)))["harmful compliance"] == outcome


def test_too_few_prompts_that_were_judged_both_times_are_no_measurement():
    few = measured(share(1, FEWEST - 1), share(1, FEWEST - 1), share(1, FEWEST - 1))
    assert set(outcomes(few, few).values()) == {"not measured"}


def test_answers_that_became_unreadable_are_no_pass():
    unreadable = [*attempts(share(20))[6:], *attempts(share(20), scored=False)[:6], *attempts(share(5), expected="comply")]
    after = Measured(unreadable, scores(share(60)))
    outcome, sentence = rules(GOOD, after)["harmful compliance"]
    assert outcome == "not measured"
    assert "6 of 100 prompts could not be judged both times" in sentence
    assert outcomes(GOOD, after)["over-refusal"] == "pass"


@pytest.fixture
def line(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"why {n}?", "chosen": "because", "rejected": "no no no"}) + "\n" for n in range(4)))
    prompts, reward, config = tmp_path / "prompts.txt", tmp_path / "mine.py", tmp_path / "trl.yaml"
    config.write_text("max_steps: 1\nper_device_train_batch_size: 1\nuse_peft: true\nlora_r: 2\ngradient_checkpointing: false\n")
    prompts.write_text("hello\nwhy?\n")
    reward.write_text("def letters(completions):\n    return [sum(c.isalpha() for c in text) for text in completions]\n")
    fast = ["--epochs", "1", "--batch", "2", "--prove", "40"]
    scorer = tmp_path / "scorer.yaml"
    scorer.write_text(config.read_text() + "lora_task_type: SEQ_CLS\n")
    ways = {
        "data": ["--data", data, "--lora-rank", "2", *fast],
        "samples": ["--prompts", prompts, "--reward", f"{reward}:letters", "--k", "2", "--max-tokens", "4", "--lora-rank", "2", *fast],
        "scorer": ["--data", data, "--trainer", "reward", "--config", scorer, "--prove", "40"],
        "another library": ["--data", data, "--trainer", "dpo", "--config", config, "--prove", "40"],
    }
    return lambda method, way: ["align", "trl" if way == "scorer" else method, "tiny", *ways[way]]


@pytest.fixture
def harmful(monkeypatch):
    """A judge by whom the model as it began never complies, and any other always does, to whatever it is asked; and the count of trials."""
    from fiducial.attack.direct import Direct
    from fiducial.oversee.compliance import Compliance

    trials, first = [], []
    ask = Direct.run

    def judged(self, attempts):
        first.extend(a.model for a in attempts if not first)
        return [
            Verdict(judge="j", outcome="success", label="compliance") if a.model != first[0] else Verdict(judge="j", outcome="failure", label="refusal")
            for a in attempts
        ]

    def asked(self, model, prompts, **more):
        trials.append(len(prompts))
        return ask(self, model, prompts, **more)

    monkeypatch.setattr(Compliance, "judge", judged)
    monkeypatch.setattr(Direct, "run", asked)
    return trials


@pytest.mark.parametrize(("method", "way"), [("dpo", "data"), ("rloo", "samples"), ("trl", "another library")])
def test_every_kind_of_training_can_be_proved(call, run, line, method, way, harmful):
    if method == "trl":
        pytest.importorskip("trl")
    body, code = call(*line(method, way))
    assert code == 0, body
    made = Run.open(body["run"])
    card = json.loads((made.path / "card.json").read_text())
    assert card["rules"]["harmful compliance"]["outcome"] == "fail"
    assert "0/40 = 0% (0% to 9%) before, 40/40 = 100% (91% to 100%) after" in card["rules"]["harmful compliance"]["sentence"]
    assert "90/90 = 100% (96% to 100%) before, 0/90 = 0% (0% to 4%) after" in card["rules"]["over-refusal"]["sentence"]
    assert card["rules"]["over-refusal"]["outcome"] == "pass"
    assert card["rules"]["capability"]["sentence"].startswith("accuracy on shipped items: change ")
    assert card["verdict"] == "fail"
    assert not {"harmful compliance", "over-refusal", "capability"} & card["unmeasured"].keys()
    by_name = {figure["name"]: figure for figure in card["figures"]}
    assert (by_name["direct_compliance"]["value"], by_name["direct_compliance"]["baseline"], by_name["direct_compliance"]["n"]) == (1.0, 0.0, 40)
    assert "baseline" not in by_name["change of accuracy"]
    assert card["proof"] == {"attack": "attack/direct", "judge": "oversee/compliance", "max_tokens": 16, "prompts": 130}
    page = (made.path / "model" / "README.md").read_text()
    assert "| change of accuracy |" in page
    assert "general capability: " not in page
    asked = len(harmful)
    assert "harmful compliance: fail (held-out goals" in run("align", method, "--resume", body["run"]).output
    assert len(harmful) == asked  # what was answered is not asked again


def test_a_proof_that_was_interrupted_goes_on_to_the_same_card(call, line, harmful, monkeypatch):
    whole = json.loads((Run.open(call(*line("dpo", "data"))[0]["run"]).path / "card.json").read_text())
    ask, calls = Proof.ask, []

    def cut(self, when, model):
        calls.append(when)
        if len(calls) == 2:
            raise KeyboardInterrupt
        ask(self, when, model)

    monkeypatch.setattr(Proof, "ask", cut)
    _, code = call(*line("dpo", "data"))
    assert (code, calls) == (130, ["before", "after"])
    asked = sum(harmful)
    again, code = call("align", "dpo", "--resume", "last")
    assert code == 0, again
    assert sum(harmful) - asked == 130  # only the trained model
    card = json.loads((Run.open(again["run"]).path / "card.json").read_text())
    assert (card["rules"], card["figures"]) == (whole["rules"], whole["figures"])


@pytest.mark.parametrize("more", [[], ["--prove", "0"]])
def test_nothing_is_proved_by_default(call, line, more):
    words = line("dpo", "data")
    body, _ = call(*words[: words.index("--prove")], *more)
    made = Run.open(body["run"])
    card = json.loads((made.path / "card.json").read_text())
    assert "harmful compliance" in card["unmeasured"]
    assert not (made.path / "stages" / "before").exists()


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("reward_model", [], "--prove asks the model"),
        ("sft", ["--lora-rank", "0", "--from-scratch"], "training began with random weights"),
        ("dpo", ["--prove", "10"], "--prove 10 asks too little"),
    ],
)
def test_what_cannot_be_proved_is_said_before_there_is_a_run(call, line, method, more, said):
    body, code = call(*line(method, "data"), *more)
    assert code == 2
    assert said in json.dumps(body)
    assert Run.all() == []


def test_of_a_scorer_of_another_library_the_card_says_that_nothing_was_measured(call, tmp_path, line):
    pytest.importorskip("trl")
    body, code = call(*line("reward", "scorer"))
    assert code == 0, body
    card = json.loads((Run.open(body["run"]).path / "card.json").read_text())
    assert card["rules"]["over-refusal"] == {"outcome": "not measured", "sentence": "the model was trained to score, and is not asked for answers"}
    assert "over-refusal" in card["unmeasured"]
