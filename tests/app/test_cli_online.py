"""`fiducial align` with prompts and rewards instead of data."""

import json

import pytest

import fiducial
from fiducial.app.cli.online import part
from fiducial.core.errors import ConfigError
from fiducial.core.records import Group
from fiducial.core.run import Run

FAST = ["--epochs", "2", "--batch", "2", "--lora-rank", "2", "--k", "2", "--max-tokens", "4", "--kl-budget", "1000", "--length-change", "none"]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("hello\nwhy?\n", encoding="utf-8")
    return path


@pytest.fixture
def mine(tmp_path):
    """A file with two rewards."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def letters(completions):\n    return [sum(c.isalpha() for c in text) for text in completions]\n"
        "def short(completions, rows):\n    return [-len(text) if row.expected == 'answer' else None for text, row in zip(completions, rows)]\n"
    )
    return path


def test_a_policy_learns_from_prompts_and_a_function(call, run, asked, mine):
    body, code = call("align", "rloo", "tiny", "--prompts", asked, "--reward", f"{mine}:letters", *FAST)
    assert code == 0
    assert (body["data"]["steps"], body["data"]["answers"]) == (2, 8)
    made = Run.open(body["run"])
    assert len(made.read_metrics()) == 2
    assert len(made.lines("groups", Group).read()) == 4
    card = json.loads((made.path / "card.json").read_text())
    assert {"verdict", "says", "rules", "figures", "gain", "before", "after", "history", "answers", "stop", "unmeasured", "about"} == card.keys()
    assert run("align", "rloo", "tiny", "--prompts", asked, "--reward", f"{mine}:letters", *FAST).stdout.count("reward.letters") == 1
    assert fiducial.open(body["data"]["model"]).fingerprint == body["data"]["fingerprint"]


def test_several_rewards_a_cost_and_demonstrations(call, tmp_path, asked, mine):
    shown = tmp_path / "shown.jsonl"
    shown.write_text(json.dumps({"prompt": "hello", "completion": "no"}) + "\n")
    cost = "{reward: " + f"{mine}:letters" + ", limit: 1, weight: 2}"
    watched = "{reward: " + f"{mine}:short" + ", weight: 0, name: brief}"
    args = ["--reward", f"{mine}:short", "--reward", watched, "--cost", cost, "--demonstrations", shown]
    body, code = call("align", "ppo", "tiny", "--prompts", asked, *args, *FAST, "--updates", "2", "--save-every", "1")
    assert code == 0
    assert {"reward.short", "reward.brief", "cost", "multiplier", "explained", "cost_explained"} <= body["data"]["last"].keys()
    assert body["data"]["best"]["step"] in (1, 2)
    assert fiducial.open(body["data"]["model"]).cost_head.trained_by == "align/ppo"


def test_a_preference_objective_learns_online_when_it_is_given_prompts(call, asked, mine):
    body, code = call("align", "dpo", "tiny", "--prompts", asked, "--reward", f"{mine}:letters", *FAST)
    assert code == 0
    assert "margin" in body["data"]["last"] or body["data"]["last"]["flat_share"] == 1.0


def test_the_shipped_reward_is_named_like_any_method_and_prompts_say_what_is_expected(call, asked):
    body, code = call("align", "grpo", "tiny", "--prompts", f"refuse={asked}", "--reward", "rubric_reward", *FAST)
    assert code == 0
    groups = Run.open(body["run"]).lines("groups", Group).read()
    assert {g.prompt.expected for g in groups} == {"refuse"}


def test_a_resumed_run_needs_no_option_again(call, asked, mine):
    body, _ = call("align", "rloo", "tiny", "--prompts", asked, "--reward", f"{mine}:letters", *FAST)
    again, code = call("align", "rloo", "--resume", body["run"])
    assert (again["run"], code) == (body["run"], 0)
    assert again["data"]["fingerprint"] == body["data"]["fingerprint"]
    assert len(Run.open(body["run"]).lines("groups", Group).read()) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["grpo", "tiny", "--reward", "a:b"], "Missing option '--prompts'"),
        (["dpo", "tiny"], "no prompts or no rewards to learn from"),
        (["dpo", "tiny", "--data", "x.jsonl", "--k", "3"], "--k is about samples"),
        (["grpo", "tiny", "--prompts", "PROMPTS", "--reward", "no/such"], "no method 'no/such'"),
        (["grpo", "tiny", "--prompts", "PROMPTS", "--reward", "align/dpo"], "of role reward is needed"),
        (["grpo", "tiny", "--prompts", "PROMPTS", "--reward", "math:no_such"], "no function 'no_such'"),
        (["grpo", "tiny", "--prompts", "PROMPTS", "--reward", "rubric_reward", "--mix", "2"], "--mix weighs demonstrations"),
        (["grpo", "tiny", "--prompts", "PROMPTS", "--reward", "rubric_reward", "--k", "1"], "compares answers, but k is 1"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said(call, asked, args, message):
    body, code = call("align", *[str(asked) if a == "PROMPTS" else a for a in args])
    assert code == 2
    assert message in body["error"]["message"]


def test_help_tells_of_prompts_and_needs_no_data(run):
    text = run("align", "grpo", "--help").stdout
    assert "--prompts" in text
    assert not [line for line in text.splitlines() if line.strip().startswith("--data")]


def test_a_reward_is_a_name_or_a_mapping_with_its_weight_and_options():
    one = part({"reward": "rubric_reward", "weight": 2, "name": "style", "agreement": 0.0})
    assert (one.weight, one.label, one.reward.agreement) == (2.0, "style", 0.0)
    assert part("align/rubric_reward").label == "rubric_reward"
    with pytest.raises(ConfigError, match="a reward is a name or a mapping"):
        part({"weight": 1})
    with pytest.raises(ConfigError, match="the weight of a reward is 'much'"):
        part({"reward": "rubric_reward", "weight": "much"})
    with pytest.raises(ConfigError, match="has no option 'colour'"):
        part({"reward": "rubric_reward", "colour": 1})


def test_a_resumed_run_does_not_go_on_with_other_demonstrations(call, tmp_path, asked, mine):
    shown = tmp_path / "shown.jsonl"
    shown.write_text(json.dumps({"prompt": "hello", "completion": "no"}) + "\n")
    body, code = call("align", "rloo", "tiny", "--prompts", asked, "--reward", f"{mine}:letters", "--demonstrations", shown, *FAST)
    assert code == 0, body
    shown.write_text(json.dumps({"prompt": "hello", "completion": "yes"}) + "\n")
    again, code = call("align", "rloo", "--resume", body["run"])
    assert code == 2
    assert "has changed since it began" in again["error"]["message"]


def test_under_a_cost_limit_the_cards_describe_the_step_whose_weights_the_model_has(call, monkeypatch, asked, mine):
    from fiducial.training import front

    monkeypatch.setattr(front, "front", list)
    monkeypatch.setattr(front, "best", lambda points, limit: points[0])
    args = ["--reward", f"{mine}:letters", "--cost", f"{{reward: {mine}:short}}", "--save-every", "1"]
    body, code = call("align", "rloo", "tiny", "--prompts", asked, *args, *FAST, "--epochs", "3")
    assert code == 0, body
    assert (body["data"]["best"]["step"], body["data"]["steps"]) == (1, 3)
    made = Run.open(body["run"]).path
    card = json.loads((made / "card.json").read_text())
    assert ([h["step"] for h in card["history"]], card["weights_of_step"]) == ([1], 1)
    assert "the weights are those of step 1" in (made / "model" / "README.md").read_text()
    events, _ = call("log", "show", "--kind", "train")
    assert events["data"]["events"][0]["body"]["weights_of_step"] == 1


def test_a_policy_with_an_adapter_does_not_take_another_rank(call, asked, mine):
    words = ["--prompts", asked, "--reward", f"{mine}:letters", *FAST]
    first, _ = call("align", "rloo", "tiny", *words)
    body, code = call("align", "rloo", "run:last", *words, "--lora-rank", "4")
    assert (code, "lora_rank 4 would be ignored" in body["error"]["message"]) == (2, True)
    body, code = call("align", "rloo", f"run:{first['run']}", *words)
    assert code == 0, body
