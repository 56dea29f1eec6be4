import pytest
import torch

from fiducial.align import learned_reward
from fiducial.align.learned_reward import LearnedReward
from fiducial.core import registry
from fiducial.core.errors import ConfigError, ModelError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scorehead import ScoreHead, scores
from fiducial.models.scripted import ScriptedModel, tiny

approx = pytest.approx
GROUP = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="yes"), Completion(text="no, never")))


@pytest.fixture
def members(monkeypatch):
    """Two trained models by name, whose heads differ, and one with another direction."""
    made = {}
    for name, (seed, higher_is, trained_by) in {
        "one": (1, "better", "align/reward_model"),
        "two": (2, "better", "align/reward_model"),
        "cost": (3, "worse", "align/cost_model"),
        "cost2": (4, "worse", "align/cost_model"),
        "steps": (5, "better", "align/process_reward"),
        "plain": (0, None, ""),
    }.items():
        made[name] = tiny()
        if higher_is:
            made[name].head = ScoreHead.fresh(made[name].width, seed=seed, higher_is=higher_is, trained_by=trained_by)
    monkeypatch.setattr(learned_reward, "opened", made.__getitem__)
    return made


def alone(model, group=GROUP):
    return scores(model, [model.encode(group.prompt.messages, c.text, end=c.finish != "length")[0] for c in group.completions]).tolist()


def test_it_gives_the_heads_score_of_each_completion(members):
    assert LearnedReward(models=("one",)).score([GROUP, GROUP]) == [approx(tuple(alone(members["one"])))] * 2


def test_several_members_are_combined_by_mean_minimum_or_mean_less_variance(members):
    a, b = alone(members["one"]), alone(members["two"])
    both = {"models": ("one", "two")}
    assert LearnedReward(**both).score([GROUP])[0] == approx([(x + y) / 2 for x, y in zip(a, b, strict=True)])
    assert LearnedReward(**both, combine="min").score([GROUP])[0] == approx([min(x, y) for x, y in zip(a, b, strict=True)])
    # the variance of two values is the square of half their difference
    careful = [(x + y) / 2 - 0.3 * ((x - y) / 2) ** 2 for x, y in zip(a, b, strict=True)]
    assert LearnedReward(**both, combine="penalised", spread_penalty=0.3).score([GROUP])[0] == approx(careful)


def test_a_cost_model_is_no_reward_and_a_reward_model_no_cost(members):
    with pytest.raises(ModelError, match="is worse, but it is read as better"):
        LearnedReward(models=("cost",)).score([GROUP])
    with pytest.raises(ModelError, match="is better, but it is read as worse"):
        LearnedReward(models=("one",), higher_is="worse").score([GROUP])


def test_the_careful_side_of_costs_is_the_highest(members):
    a, b = alone(members["cost"]), alone(members["cost2"])
    both = {"models": ("cost", "cost2"), "higher_is": "worse"}
    assert LearnedReward(**both, combine="min").score([GROUP])[0] == approx([max(x, y) for x, y in zip(a, b, strict=True)])
    careful = [(x + y) / 2 + 0.5 * ((x - y) / 2) ** 2 for x, y in zip(a, b, strict=True)]
    assert LearnedReward(**both, combine="penalised").score([GROUP])[0] == approx(careful)


@pytest.mark.parametrize("ends", [(6, 12, 17), ()], ids=["given", "by separator"])
def test_a_solution_is_the_product_the_minimum_or_the_last_of_its_steps(members, ends):
    text = "1+1=2\n2*3=7\n7-1=6"
    group = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text=text, ends=ends, values=(None,) * len(ends)),))
    model = members["steps"]
    right = torch.sigmoid(scores(model, [model.encode(user("q"), text[:end], end=False)[0] for end in (6, 12, 17)])).tolist()
    by = {steps: LearnedReward(models=("steps",), steps=steps).score([group])[0][0] for steps in ("product", "min", "last")}
    assert by == approx({"product": right[0] * right[1] * right[2], "min": min(right), "last": right[2]})


def test_an_answer_that_failed_has_no_score(members):
    failed = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="", finish="error", error="x"), Completion(text="yes")))
    (found,) = LearnedReward(models=("one",)).score([failed])
    assert found[0] is None
    assert found[1] == approx(alone(members["one"])[0])


def test_nothing_is_scored_as_nothing(members):
    assert LearnedReward(models=("one",)).score([]) == []


def test_without_a_model_or_with_one_that_has_no_head_it_says_what_to_do(members):
    with pytest.raises(ConfigError, match="needs a trained model"):
        LearnedReward().score([GROUP])
    with pytest.raises(ModelError, match="no score head"):
        LearnedReward(models=("plain",)).score([GROUP])


def test_a_model_without_weights_here_has_no_head(monkeypatch):
    monkeypatch.setattr("fiducial.models.open.open", lambda name: ScriptedModel())
    with pytest.raises(ModelError, match="no weights here"):
        LearnedReward(models=("scripted:x-test",)).score([GROUP])


@pytest.mark.parametrize("options", [{"combine": "max"}, {"steps": "sum"}, {"separator": ""}, {"spread_penalty": -1.0}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError):
        registry.create("align/learned_reward", options)
