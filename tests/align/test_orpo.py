from dataclasses import replace
from math import exp, log, log1p

import numpy as np
import pytest
import torch

from fiducial.align.orpo import ORPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.roles import Reward
from fiducial.models.scripted import tiny
from fiducial.training.data import Data
from fiducial.training.objective import Step, layout
from fiducial.training.online_options import OnlineOptions
from fiducial.training.online_task import Task, check
from fiducial.training.options import TrainOptions
from fiducial.training.rewards import Mixture, Part

approx = pytest.approx


def odds(mean):
    return exp(mean) / (1 - exp(mean))


def test_the_loss_is_that_of_the_formula(pairs):
    first, second = pairs.w / pairs.w_len, pairs.l / pairs.l_len
    ratio = np.log(np.exp(first) / (1 - np.exp(first))) - np.log(np.exp(second) / (1 - np.exp(second)))
    nll = -(pairs.p * first + (1 - pairs.p) * second)
    by_hand = nll + 0.3 * (pairs.p * np.logaddexp(0, -ratio) + (1 - pairs.p) * np.logaddexp(0, ratio))
    assert ORPO(beta=0.3)(pairs.policy).tolist() == approx(by_hand, rel=1e-5)


def test_the_gradient_is_that_of_the_likelihood_and_of_the_log_odds(group, pull):
    # means -0.5 and -2; d log odds / d mean = 1 / (1 - exp(mean))
    gradient, loss = pull(ORPO(beta=0.3), group((-1.0, -8.0), length=[[2, 4]], grad=True))
    ratio = log(odds(-0.5) / odds(-2.0))
    slope = 0.3 / (1 + exp(ratio))
    assert loss == approx(0.5 + 0.3 * log1p(exp(-ratio)))
    assert gradient == approx([-1 / 2 - slope / (1 - exp(-0.5)) / 2, slope / (1 - exp(-2.0)) / 4])


def test_a_completion_that_is_certain_has_finite_odds(group, pull):
    gradient, loss = pull(ORPO(beta=0.1), group((0.0, -5e4), length=[[3, 3]], grad=True))
    assert loss == approx(0.0, abs=1e-6)
    assert gradient[0] == approx(-1 / 3)
    gradient, loss = pull(ORPO(beta=0.1), group((-50.0, 0.0), grad=True))
    assert loss == approx(50 + 0.1 * (50 + log(1e6)), rel=1e-3)
    assert gradient[0] == approx(-1.1)


def test_a_group_of_one_has_the_likelihood_alone(group):
    assert ORPO()(group((-6.0, 0.0), length=[[3, 0]], mask=[[True, False]])).item() == approx(2.0)
    assert ORPO()(group((-6.0,), length=[[3]])).item() == approx(2.0)


def test_with_a_mean_over_tokens_a_long_completion_counts_as_its_tokens(group):
    # 8 nats over 4 tokens and 1 over 1: by sequences (2 + 1) / 2, by tokens 9 / 5
    groups = group((-8.0, 0.0), (-1.0, 0.0), length=[[4, 0], [1, 0]], mask=[[True, False]] * 2)
    assert ORPO()(groups).mean().item() == approx(1.5)
    assert ORPO(mean="token")(groups).mean().item() == approx(9 / 5)


def test_a_mean_over_tokens_counts_groups_by_their_weight(group):
    groups = replace(group((-8.0,), (-1.0,), length=[[4], [1]]), weight=torch.tensor([1.0, 3.0]))
    losses = ORPO(mean="token")(groups)
    assert float((groups.weight * losses).sum() / groups.weight.sum()) == approx((8 + 3 * 1) / (4 + 3 * 1))
    weightless = replace(groups, weight=torch.zeros(2))
    assert ORPO(mean="token")(weightless).isfinite().all()


def test_over_whole_texts_the_prompt_counts_in_the_likelihood_and_not_in_the_odds():
    """Chosen: prompt -1 -3, answer -2; rejected: the same prompt, answer -4 -1. By hand: (1 + 3 + 2) / 3 and the odds of -2 and -2.5."""
    given = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="a"), Completion(text="b")))
    parts = layout([given], [[3, 4]], {"answer": torch.tensor([0.0, 0, 1, 0, 0, 1, 1])})
    policy = parts.with_tokens(torch.tensor([-1.0, -3, -2, -1, -3, -4, -1]))
    ratio = log(odds(-2.0) / odds(-2.5))
    for mean in ("sequence", "token"):
        assert ORPO(beta=0.3, likelihood="text", mean=mean)(policy).item() == approx(2.0 + 0.3 * log1p(exp(-ratio)))
    assert ORPO(likelihood="text").metrics(policy) == approx({"accuracy": 1.0, "margin": ratio, "chosen_logp": -2.0, "rejected_logp": -2.5})
    assert ORPO().reads == ()


def test_whole_texts_are_scored_from_their_second_token_on_and_answers_told_apart():
    model = tiny()
    given = [
        Group(prompt=Prompt(messages=user(q)), completions=(Completion(text=a), Completion(text=b))) for q, a, b in [("one", "x", "yyy"), ("a b c", "z", "w")]
    ]
    whole, plain = (Data.of(model, given, objective, TrainOptions()) for objective in (ORPO(likelihood="text"), ORPO()))
    assert whole.paths.ids == plain.paths.ids
    assert list(whole.paths.start) == [1] * 4
    assert whole.parts.length.flatten().tolist() == [len(ids) - 1 for ids in whole.paths.ids]
    assert torch.equal(whole.parts.summed(whole.parts.known("answer")).long(), plain.parts.length)


def test_whole_texts_are_not_drawn_from_the_policy():
    class Length(Reward):
        def score(self, groups):
            return [tuple(float(len(c.text)) for c in g.completions) for g in groups]

    task = Task([Prompt(messages=user("q"))], Mixture.of([Part(Length())]))
    check(task, ORPO(), TrainOptions(), OnlineOptions(k=2))
    with pytest.raises(ConfigError, match="cannot learn from samples"):
        check(task, ORPO(likelihood="text"), TrainOptions(), OnlineOptions(k=2))


def test_a_part_of_a_step_is_divided_by_what_the_whole_is(group):
    groups = group((-8.0, -3.0), (-1.0, -2.0), (-4.0, -4.0), length=[[4, 2], [1, 1], [2, 3]])
    whole = ORPO(mean="token")(groups)
    parts = [ORPO(mean="token")(replace(groups.select([i]), step=Step.of(groups))) for i in range(3)]
    assert torch.cat(parts).tolist() == approx(whole.tolist())


def test_a_beta_of_zero_is_a_config_error():
    with pytest.raises(ConfigError, match="beta"):
        registry.create("align/orpo", {"beta": 0.0})
