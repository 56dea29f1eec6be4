"""Every option of training and of sampling changes what is trained, or what else it promises to change; a new option needs its line here."""

from dataclasses import fields, replace

import pytest

from fiducial.align.ppo import PPO
from fiducial.align.reward_model import RewardModel
from fiducial.align.rloo import RLOO
from fiducial.align.sft import SFT
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Message, Prompt, user
from fiducial.core.roles import Reward
from fiducial.models.scripted import tiny
from fiducial.training.constraint import Multiplier
from fiducial.training.loop import train
from fiducial.training.online import learn
from fiducial.training.online_options import OnlineOptions
from fiducial.training.options import TrainOptions

TRAIN = TrainOptions(batch=2, epochs=2, learning_rate=1e-2, lora_rank=4, save_every=100)
FULL = {"lora_rank": 0}
WEIGHTS = {
    "epochs": ({"epochs": 3}, {}),
    "batch": ({"batch": 3}, {}),
    "learning_rate": ({"learning_rate": 2e-2}, {}),
    "lora_rank": ({"lora_rank": 2}, {}),
    "lora_depth": ({"lora_depth": 0.5}, {}),
    "warmup": ({"warmup": 0.9}, {}),
    "learn": ({"learn": "all"}, {}),
    "neftune": ({"neftune": 5.0}, {}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "clip": ({"clip": 1e-9}, {}),
    "from_scratch": (FULL | {"from_scratch": True, "seed": 1}, FULL | {"seed": 1}),
    "sizes": (FULL | {"from_scratch": True, "sizes": {"num_hidden_layers": 1}}, FULL | {"from_scratch": True}),
    "max_length": ({"max_length": 50}, {}),
    "seed": ({"seed": 1}, {}),
    "held_out": ({"held_out": 0.4}, {}),
}
"""Options that change the trained weights: option -> (with another value, what it is compared with)."""
ELSE = {"save_every", "watch_every", "minutes"}
"""Options that change something else, each with a test of its own."""

SAMPLE = OnlineOptions(k=3, max_tokens=6, kl_budget=1e9, length_change=None)
SAMPLED = {
    "k": {"k": 4},
    "max_tokens": {"max_tokens": 5},
    "temperature": {"temperature": 0.7},
    "updates": {"updates": 2},
    "end_penalty": {"end_penalty": -9.0},
    "kl_target": {"kl_target": 1e-9},
    "mix": {"mix": 0.5},
}
STOPS = {"kl_budget": {"kl_budget": 1e-9}, "length_change": {"length_change": 1e-9}}
"""Options that end a run."""


def fingerprint(model):
    model.changed()
    return model.fingerprint


class Shortness(Reward):
    """How little of an answer are letters."""

    @property
    def name(self):
        return "test/shortness"

    def options(self):
        return {}

    def score(self, groups):
        return [tuple(0.1 * (6 - sum(c.isalpha() for c in each.text)) for each in g.completions) for g in groups]


def told(made):
    """Demonstrations of which one has an earlier answer, and one is longer than 50 tokens."""
    talk = Prompt(messages=(*user("hello"), Message(role="assistant", content="hi"), *user("why?")))
    return [*made.pairs(4), Group(prompt=talk, completions=(Completion(text="so"),)), made.group(5, "x" * 40)]


def trained(groups, folder, **changes):
    model = tiny()
    result = train(model, groups, SFT(), TRAIN.model_copy(update=changes), folder=folder)
    return model, result


def test_every_option_of_training_is_looked_at():
    assert set(TrainOptions.model_fields) == WEIGHTS.keys() | ELSE


@pytest.mark.parametrize("option", WEIGHTS)
def test_an_option_of_training_changes_the_weights(made, tmp_path, option):
    changes, against = WEIGHTS[option]
    one, other, again = (fingerprint(trained(told(made), tmp_path / n, **c)[0]) for n, c in (("one", against), ("other", changes), ("again", against)))
    assert one == again
    assert one != other


def test_save_every_sets_when_checkpoints_are_written(made, tmp_path, monkeypatch):
    from fiducial.training import checkpoint

    steps, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, **given: (steps.append(given["step"]), save(folder, **given)))
    trained(made.pairs(4), tmp_path, save_every=3, epochs=4)
    assert steps == [3, 6, 8]


def test_watch_every_sets_when_samples_are_looked_at(made, tmp_path):
    steps = []
    asked = TRAIN.model_copy(update={"watch_every": 3, "epochs": 4})
    train(tiny(), made.pairs(4), SFT(), asked, folder=tmp_path, watch=lambda step, _: (steps.append(step), ({}, ""))[1])
    assert steps == [3, 6, 8]


def test_minutes_end_a_training(made, tmp_path):
    assert "budget of" in trained(made.pairs(4), tmp_path, minutes=1e-9)[1].stop


def sampled(trainers, folder, objective=None, **changes):
    model = tiny()
    task = trainers.Task(trainers.PROMPTS, trainers.Mixture.of([trainers.Part(trainers.Letters())]))
    task = replace(task, demonstrations=[Group(prompt=p, completions=(Completion(text="no, no"),)) for p in trainers.PROMPTS])
    result = learn(model, task, objective or RLOO(beta=0.5), TRAIN.model_copy(update={"epochs": 6}), SAMPLE.model_copy(update=changes), folder=folder)
    return model, result


def test_every_option_of_sampling_is_looked_at():
    assert set(OnlineOptions.model_fields) == SAMPLED.keys() | STOPS.keys() | {"kl_horizon"}


def test_kl_horizon_sets_how_fast_the_weight_of_the_kl_term_moves(trainers, tmp_path):
    one, other = (fingerprint(sampled(trainers, tmp_path / str(n), kl_target=1e-9, kl_horizon=n)[0]) for n in (10.0, 10_000.0))
    assert one != other


@pytest.mark.parametrize("option", SAMPLED)
def test_an_option_of_sampling_changes_the_weights(trainers, tmp_path, option):
    one, other, again = (fingerprint(sampled(trainers, tmp_path / n, **c)[0]) for n, c in (("one", {}), ("other", SAMPLED[option]), ("again", {})))
    assert one == again
    assert one != other


@pytest.mark.parametrize("option", STOPS)
def test_an_option_of_sampling_ends_a_run(trainers, tmp_path, option):
    _, whole = sampled(trainers, tmp_path / "whole", PPO())
    _, short = sampled(trainers, tmp_path / "short", PPO(), **STOPS[option])
    assert whole.stop == ""
    assert short.stop
    assert short.steps < whole.steps


LIMIT = {"limit": -0.5, "weight": 1.0, "most": 20.0, "rate": 0.1, "delay": 0}
COSTED = {"limit": 5.0, "weight": 2.0, "most": 1.0, "rate": 1.0, "delay": 5}
"""Options of a limit on cost: where a run begins from, so that no bound is met; and another value of each."""


def test_every_option_of_a_limit_on_cost_is_looked_at():
    assert {f.name for f in fields(Multiplier)} == COSTED.keys() | {"recent"}


@pytest.mark.parametrize("option", COSTED)
def test_an_option_of_a_limit_on_cost_changes_the_weights(trainers, tmp_path, option):
    def learnt(name, **changes):
        model, rewards = tiny(), trainers.Mixture.of([trainers.Part(trainers.Letters())])
        task = trainers.Task(trainers.PROMPTS, rewards, Shortness(), Multiplier(**LIMIT | changes))
        learn(model, task, RLOO(), TRAIN.model_copy(update={"epochs": 6}), SAMPLE, folder=tmp_path / name)
        return fingerprint(model)

    one, again, other = learnt("one"), learnt("again"), learnt("other", **{option: COSTED[option]})
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("changed", "objective", "message"),
    [
        ({"lora_rank": 0, "lora_depth": 0.5}, SFT(), "lora_depth has no effect when lora_rank is 0"),
        ({"watch_every": 2}, RewardModel(), "watch_every has no effect where no answers are drawn and nothing is held out"),
    ],
)
def test_an_option_without_effect_is_refused(made, tmp_path, changed, objective, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny(), made.pairs(), objective, TRAIN.model_copy(update=changed), folder=tmp_path)
