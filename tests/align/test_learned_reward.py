from dataclasses import replace

import pytest
import torch

from fiducial.align import learned_reward
from fiducial.align.learned_reward import LearnedReward
from fiducial.core import registry
from fiducial.core.errors import ConfigError, ModelError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scorehead import Scale, ScoreHead, scores
from fiducial.models.scripted import ScriptedModel, tiny
from fiducial.training.online_task import Task
from fiducial.training.rewards import Mixture, Part

approx = pytest.approx
SCALES = {"one": Scale(0.5, 2.0), "two": Scale(-1.0, 0.1), "cost": Scale(0.3, 0.5), "cost2": Scale(-0.2, 4.0)}
GROUP = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="yes"), Completion(text="no, never")))


@pytest.fixture
def members(monkeypatch):
    """Trained models by name, whose heads, directions and scales differ; those called old did not keep a scale."""
    made = {}
    for name, (seed, higher_is, trained_by) in {
        "one": (1, "better", "align/reward_model"),
        "two": (2, "better", "align/reward_model"),
        "cost": (3, "worse", "align/cost_model"),
        "cost2": (4, "worse", "align/cost_model"),
        "steps": (5, "better", "align/process_reward"),
        "steps2": (6, "better", "align/process_reward"),
        "old": (1, "better", "align/reward_model"),
        "old2": (2, "better", "align/reward_model"),
        "policy": (7, "better", "align/ppo"),
        "plain": (0, None, ""),
    }.items():
        made[name] = tiny()
        if higher_is:
            head = ScoreHead.fresh(made[name].width, seed=seed, higher_is=higher_is, trained_by=trained_by)
            made[name].head = replace(head, scale=SCALES.get(name))
    monkeypatch.setattr(learned_reward, "opened", made.__getitem__)
    return made


def alone(model, group=GROUP):
    return scores(model, [model.encode(group.prompt.messages, c.text, end=c.finish != "length")[0] for c in group.completions]).tolist()


def test_it_gives_the_heads_score_of_each_completion_from_the_mean_of_preferred_answers(members):
    assert LearnedReward(models=("one",)).score([GROUP, GROUP]) == [approx(tuple(s - 0.5 for s in alone(members["one"])))] * 2


def test_a_model_that_kept_no_scale_gives_its_scores_as_they_are(members):
    assert LearnedReward(models=("old",)).score([GROUP])[0] == approx(alone(members["old"]))


def test_several_members_are_combined_on_one_scale_by_mean_minimum_or_mean_less_variance(members):
    a, b = [(s - 0.5) / 2.0 for s in alone(members["one"])], [(s + 1.0) / 0.1 for s in alone(members["two"])]
    both = {"models": ("one", "two")}
    assert LearnedReward(**both).score([GROUP])[0] == approx([(x + y) / 2 for x, y in zip(a, b, strict=True)])
    assert LearnedReward(**both, combine="min").score([GROUP])[0] == approx([min(x, y) for x, y in zip(a, b, strict=True)])
    # the variance of two values is the square of half their difference
    careful = [(x + y) / 2 - 0.3 * ((x - y) / 2) ** 2 for x, y in zip(a, b, strict=True)]
    assert LearnedReward(**both, combine="penalised", spread_penalty=0.3).score([GROUP])[0] == approx(careful)


def test_what_members_say_together_does_not_depend_on_the_scale_of_one(members):
    asked = LearnedReward(models=("one", "two"), combine="penalised")
    before = asked.score([GROUP])[0]
    head = members["two"].head
    members["two"].head = replace(head, weight=100 * head.weight, scale=Scale(100 * head.scale.location, 100 * head.scale.spread))
    assert asked.score([GROUP])[0] == approx(before, rel=1e-4)


@pytest.mark.parametrize("combine", ["min", "penalised"])
@pytest.mark.parametrize("models", [("one", "old"), ("old", "old2")])
def test_a_minimum_or_a_variance_of_scores_of_no_known_scale_is_refused(members, combine, models):
    with pytest.raises(ModelError, match=f"old does not say on what scale .* {combine} over several") as error:
        LearnedReward(models=models, combine=combine).score([GROUP])
    assert "train it again" in error.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("one", "two"), "spread_penalty": 0.1}, "spread_penalty has no effect when combine is mean"),
        ({"models": ("one",), "combine": "min"}, "combine has no effect on the score of a single model"),
        ({"models": ("one",), "steps": "min"}, "steps has no effect on models that score whole answers"),
        ({"models": ("one", "two"), "separator": "#"}, "separator has no effect on models that score whole answers"),
    ],
)
def test_an_option_that_does_nothing_to_these_models_is_refused(members, options, message):
    with pytest.raises(ConfigError, match=message):
        LearnedReward(**options).score([GROUP])


def test_a_mean_where_some_scale_is_not_known_is_of_scores_as_they_are_and_says_so_once(members, caplog):
    a, b = alone(members["one"]), alone(members["old"])
    learned_reward._warn.cache_clear()
    for _ in range(2):
        assert LearnedReward(models=("one", "old")).score([GROUP])[0] == approx([(x + y) / 2 for x, y in zip(a, b, strict=True)])
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["old"]


def test_process_models_are_on_one_scale_and_stand_beside_their_like_alone(members):
    a, b = (LearnedReward(models=(name,)).score([GROUP])[0] for name in ("steps", "steps2"))
    assert LearnedReward(models=("steps", "steps2"), combine="min").score([GROUP])[0] == approx([min(x, y) for x, y in zip(a, b, strict=True)])
    with pytest.raises(ModelError, match="some of one, steps are read at every step"):
        LearnedReward(models=("one", "steps")).score([GROUP])


def test_whoever_learns_from_it_learns_of_every_member_that_nothing_proves(members, monkeypatch):
    asked = []
    monkeypatch.setattr("fiducial.training.headproof.refuse_unproven", lambda *said: asked.append(said))
    learnt_from = LearnedReward(models=("one", "two"), cards=("run:A",))
    learnt_from.refuse_unproven()
    assert asked == [("one", members["one"], ("run:A",)), ("two", members["two"], ("run:A",))]
    Mixture.of([Part(learnt_from)])
    assert len(asked) == 4
    # what is only watched may be as bad as it likes; a limit may not
    Mixture.of([Part(learnt_from, 0.0, "watched"), Part(LearnedReward(models=("one",), unproven=True))])
    assert len(asked) == 4
    Task([], Mixture.of([Part(LearnedReward(models=("one",), unproven=True))]), cost=LearnedReward(models=("cost",), higher_is="worse"))
    assert len(asked) == 5


def test_cards_that_nobody_asks_for_are_refused(members):
    with pytest.raises(ConfigError, match="cards has no effect when unproven models are taken"):
        LearnedReward(models=("one",), cards=("run:A",), unproven=True)


def test_a_cost_model_is_no_reward_and_a_reward_model_no_cost(members):
    with pytest.raises(ModelError, match="is worse, but it is read as better"):
        LearnedReward(models=("cost",)).score([GROUP])
    with pytest.raises(ModelError, match="is better, but it is read as worse"):
        LearnedReward(models=("one",), higher_is="worse").score([GROUP])


def test_a_cost_keeps_its_zero_and_the_careful_side_of_costs_is_the_highest(members):
    assert LearnedReward(models=("cost",), higher_is="worse").score([GROUP])[0] == approx(alone(members["cost"]))
    a, b = [s / 0.5 for s in alone(members["cost"])], [s / 4.0 for s in alone(members["cost2"])]
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


def test_white_space_is_no_step_and_a_solution_reads_as_it_was_taught(members):
    spaced, plain = (Group(prompt=Prompt(messages=user("q")), completions=(Completion(text=t),)) for t in ("\na\n\n b \n \t\n\nc\n", "a\n b \nc"))
    model = members["steps"]
    right = torch.sigmoid(scores(model, [model.encode(user("q"), text, end=False)[0] for text in ("a\n", "a\n b \n", "a\n b \nc")])).tolist()
    for group in (spaced, plain):
        assert LearnedReward(models=("steps",)).score([group])[0] == approx([right[0] * right[1] * right[2]])
    nothing = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="\n"),))
    assert LearnedReward(models=("steps",)).score([nothing])[0][0] is not None


def test_a_model_that_learnt_from_outcomes_is_read_at_the_last_step_unless_told_otherwise(members):
    group = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="1+1=2\n2*3=7\n7-1=6"),))
    by = {steps: LearnedReward(models=("steps",), steps=steps).score([group])[0] for steps in ("product", "last", "as_trained")}
    assert by["as_trained"] == by["product"] != by["last"]
    members["steps"].head = replace(members["steps"].head, learns_from="outcome")
    by |= {"outcome": LearnedReward(models=("steps",)).score([group])[0], "told": LearnedReward(models=("steps",), steps="product").score([group])[0]}
    assert by["outcome"] == by["last"]
    assert by["told"] == by["product"]


def test_a_process_model_doubts_a_solution_by_its_least_step_and_others_doubt_none(members):
    text = "1+1=2\n2*3=7"
    group = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text=text), Completion(text="", finish="error")))
    model = members["steps"]
    least = min(scores(model, [model.encode(user("q"), t, end=False)[0] for t in ("1+1=2\n", text)]).tolist())
    assert LearnedReward(models=("steps",)).doubts([group]) == [(least < 0, None)]
    assert LearnedReward(models=("one",)).doubts([group]) == [(None, None)]
    members["steps"].head = replace(model.head, learns_from="outcome")
    assert LearnedReward(models=("steps",)).doubts([group]) == [(None, None)]


def test_an_answer_that_failed_has_no_score(members):
    failed = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="", finish="error", error="x"), Completion(text="yes")))
    (found,) = LearnedReward(models=("one",)).score([failed])
    assert found[0] is None
    assert found[1] == approx(alone(members["one"])[0] - 0.5)


def test_nothing_is_scored_as_nothing(members):
    assert LearnedReward(models=("one",)).score([]) == []


def test_without_a_model_or_with_one_that_has_no_head_it_says_what_to_do(members):
    with pytest.raises(ConfigError, match="needs a trained model"):
        LearnedReward().score([GROUP])
    with pytest.raises(ModelError, match="no score head"):
        LearnedReward(models=("plain",)).score([GROUP])
    with pytest.raises(ModelError, match="values a policy's tokens"):
        LearnedReward(models=("policy",)).score([GROUP])  # it values a policy's tokens


def test_a_model_without_weights_here_has_no_head(monkeypatch):
    monkeypatch.setattr("fiducial.models.open.open", lambda name: ScriptedModel())
    with pytest.raises(ModelError, match="no weights here"):
        LearnedReward(models=("scripted:x-test",)).score([GROUP])


@pytest.mark.parametrize("options", [{"combine": "max"}, {"steps": "sum"}, {"separator": ""}, {"spread_penalty": -1.0}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError):
        registry.create("align/learned_reward", options)
