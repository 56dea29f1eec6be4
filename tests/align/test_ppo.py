"""PPO by hand: episodes of six tokens and shorter ones."""

from dataclasses import replace
from math import log, sqrt

import pytest
import torch

from fiducial.align.ppo import PPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout

approx = pytest.approx


def parts(rewards, lengths, given=None):
    groups = [Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="b"),) * len(r), rewards=tuple(r)) for r in rewards]
    return layout(groups, lengths, given or {})


def lessons(objective, rewards, lengths, old, reference, values):
    plain = parts(rewards, lengths)
    return objective.lessons(plain.with_tokens(torch.tensor(old), torch.tensor(values)), plain.with_tokens(torch.tensor(reference)), room=10)


def test_the_reward_lands_on_the_last_token_and_the_kl_on_every_one():
    """With no discount, no decay and no values the return of a token is the sum of what follows it."""
    objective = PPO(beta=0.5, decay=1.0)
    old, reference = [-1.0] * 6, [-1.0, -1.2, -1.0, -1.0, -1.0, -1.4]
    found = lessons(objective, [(2.0,)], [[6]], old, reference, [0.0] * 6)
    # k1 is 0.2 at the second token and 0.4 at the last: 2 - 0.5 * 0.4 = 1.8 at the end, -0.1 at the second
    assert found.given["return"].tolist() == approx([1.7, 1.7, 1.8, 1.8, 1.8, 1.8])


def test_a_shorter_answer_ends_where_it_ends():
    found = lessons(PPO(beta=0.0, decay=1.0), [(5.0, -1.0)], [[2, 3]], [-1.0] * 5, [-1.0] * 5, [0.0] * 5)
    assert found.given["return"].tolist() == approx([5.0, 5.0, -1.0, -1.0, -1.0])


def test_advantages_are_whitened_over_all_tokens_and_returns_are_not():
    found = lessons(PPO(beta=0.0, decay=1.0), [(1.0, -1.0)], [[1, 1]], [-1.0] * 2, [-1.0] * 2, [0.5, 0.5])
    # 0.5 and -1.5: mean -0.5, sample deviation sqrt(2)
    assert found.given["advantage"].tolist() == approx([1 / sqrt(2), -1 / sqrt(2)])
    assert found.given["return"].tolist() == approx([1.0, -1.0])
    assert found.given["expected"].tolist() == [0.5, 0.5]


def test_the_loss_is_the_clipped_surrogate_and_the_larger_of_two_value_errors():
    objective = PPO(value=0.1, value_clip=0.2)
    given = {"old": [-1.0, -1.0], "advantage": [1.0, -1.0], "return": [2.0, 0.0], "expected": [1.0, 1.0], "share": [1.0, 1.0]}
    group = parts([(1.0, 0.0)], [[1, 1]], {n: torch.tensor(v) for n, v in given.items()})
    logp = torch.tensor([-1.0 + log(1.5), -1.0 + log(1.5)], requires_grad=True)
    values = torch.tensor([1.5, 0.5], requires_grad=True)
    loss = objective(group.with_tokens(logp, values))
    # ratio 1.5: rewarded up to 1.2, punished in full; values are held to 1.2 and 0.8, whose errors 0.8 are the larger ones
    assert loss.item() == approx(-1.2 + 1.5 + 0.1 * (0.64 / 2 + 0.64 / 2))
    loss.sum().backward()
    assert logp.grad.tolist() == approx([0.0, 1.5])
    assert values.grad.tolist() == [0.0, 0.0]
    assert objective.size(group).tolist() == [2.0]
    assert objective.metrics(group.with_tokens(logp.detach(), values.detach()))["clipped"] == 0.5


def test_a_value_near_what_it_was_learns_towards_the_return():
    objective = PPO(value=0.5)
    given = {"old": [-1.0], "advantage": [0.0], "return": [2.0], "expected": [1.0], "share": [1.0]}
    group = parts([(1.0,)], [[1]], {n: torch.tensor(v) for n, v in given.items()})
    values = torch.tensor([1.1], requires_grad=True)
    objective(group.with_tokens(torch.tensor([-1.0]), values)).sum().backward()
    assert values.grad.tolist() == approx([0.5 * (1.1 - 2.0)])


def test_explained_is_the_share_of_the_returns_variance():
    given = {"old": [-1.0] * 2, "advantage": [0.0] * 2, "return": [2.0, 0.0], "expected": [1.5, 0.5], "share": [1.0] * 2}
    group = parts([(1.0, 0.0)], [[1, 1]], {n: torch.tensor(v) for n, v in given.items()})
    # errors 0.5 and -0.5 have variance 0.25, returns 1
    assert PPO().metrics(group.with_tokens(torch.tensor([-1.0, -1.0]), torch.zeros(2)))["explained"] == approx(0.75)


def test_one_answer_per_prompt_is_enough_and_equal_rewards_are_counted():
    found = lessons(PPO(), [(1.0,), (1.0, 1.0), (1.0, 0.0)], [[1], [1, 1], [2, 1]], [-1.0] * 6, [-1.0] * 6, [0.0] * 6)
    assert found.flat.tolist() == [False, True, False]


def limited(objective, rewards, costs, lengths, drift, values, cost_values, weight):
    """Lessons under a limit on cost; `drift` is by how much the log-probabilities have moved from the reference."""
    plain = replace(parts(rewards, lengths), costs=torch.tensor(costs), cost_weight=weight)
    old = plain.with_tokens(torch.tensor(drift) - 1, torch.tensor(values), torch.tensor(cost_values))
    return objective.lessons(old, plain.with_tokens(-torch.ones(len(drift))), room=10)


EPISODE = {"rewards": [(2.0,)], "costs": [[1.0]], "lengths": [[3]], "drift": [0.2, 0.0, -0.1], "values": [0.5, 1.0, 1.5], "cost_values": [0.2, -0.2, 0.4]}
"""Three tokens: rewards -0.02, 0, 2.01 and costs 0.02, 0, 0.99 with beta 0.1."""
SPREAD = sqrt((0.375**2 + 0.27125**2 + 0.10375**2) / 2)
PUSHED = [0.375 / SPREAD, -0.27125 / SPREAD, -0.10375 / SPREAD]


def test_reward_and_cost_have_a_critic_each_and_their_advantages_are_balanced():
    found = limited(PPO(beta=0.1, decay=0.5), **EPISODE, weight=3.0).given
    # surprises of the reward 0.48, 0.5, 0.51, of the cost -0.38, 0.6, 0.59; from the end each has half of the next one's advantage added
    assert found["return"].tolist() == approx([0.5 + 0.8575, 1.0 + 0.755, 1.5 + 0.51])
    assert found["cost_return"].tolist() == approx([0.2 + 0.0675, -0.2 + 0.895, 0.4 + 0.59])
    assert (found["expected"].tolist(), found["cost_expected"].tolist()) == (approx([0.5, 1.0, 1.5]), approx([0.2, -0.2, 0.4]))
    # (0.8575 - 3 * 0.0675) / 4 = 0.16375, (0.755 - 3 * 0.895) / 4 = -0.4825, (0.51 - 3 * 0.59) / 4 = -0.315; their mean is -0.21125
    assert found["advantage"].tolist() == approx(PUSHED, rel=1e-4)


def test_the_loss_has_a_value_error_of_either_critic_and_each_learns_from_its_own():
    objective = PPO(beta=0.1, decay=0.5, value=0.1, value_clip=0.2)
    given = limited(objective, **EPISODE, weight=3.0).given | {"old": torch.tensor([-1.0, -1.0, -1.0])}
    group = parts([(2.0,)], [[3]], given)
    logp = torch.tensor([-1.0 + log(1.5), -1.0, -1.0 + log(0.5)])
    values, costs = torch.tensor([0.6, 1.0, 1.9], requires_grad=True), torch.tensor([0.2, -0.6, 0.4], requires_grad=True)
    loss = objective(group.with_tokens(logp, values, costs))
    # ratios 1.5, 1 and 0.5 are held to 1.2 and 0.8; values 1.9 and -0.6 to 1.7 and -0.4, of which the first has the larger error held, the second free
    pushed = -1.2 * PUSHED[0] - PUSHED[1] - 0.8 * PUSHED[2]
    reward, cost = 0.7575**2 + 0.755**2 + 0.31**2, 0.0675**2 + 1.295**2 + 0.59**2
    assert loss.item() == approx(pushed + 0.1 * (reward + cost) / 2, rel=1e-4)
    loss.sum().backward()
    assert values.grad.tolist() == approx([0.1 * -0.7575, 0.1 * -0.755, 0.0], rel=1e-4)
    assert costs.grad.tolist() == approx([0.1 * -0.0675, 0.1 * -1.295, 0.1 * -0.59], rel=1e-4)


def test_the_weight_of_the_cost_moves_the_policy_and_not_what_the_critics_learn():
    light, heavy = (limited(PPO(), **EPISODE, weight=weight).given for weight in (0.1, 20.0))
    assert light["return"].tolist() == heavy["return"].tolist()
    assert light["cost_return"].tolist() == heavy["cost_return"].tolist()
    assert (light["advantage"] - heavy["advantage"]).abs().max() > 0.1


def test_critics_that_agree_teach_what_one_critic_of_the_balance_would():
    """Estimates are linear, and the KL counts beta on either side."""
    weight, generator = 3.0, torch.Generator().manual_seed(0)
    drift, values, cost_values = (torch.randn(7, generator=generator).tolist() for _ in range(3))
    rewards, costs, lengths = [(1.0, -2.0), (0.5, 3.0)], [[0.0, 1.0], [2.0, -1.0]], [[2, 1], [1, 3]]
    both = limited(PPO(beta=0.3), rewards, costs, lengths, drift, values, cost_values, weight).given
    merged = [tuple((r - weight * c) / (1 + weight) for r, c in zip(*pair, strict=True)) for pair in zip(rewards, costs, strict=True)]
    value = [(v - weight * c) / (1 + weight) for v, c in zip(values, cost_values, strict=True)]
    one = lessons(PPO(beta=0.3), merged, lengths, [d - 1 for d in drift], [-1.0] * 7, value).given
    assert both["advantage"].tolist() == approx(one["advantage"].tolist(), abs=1e-4)


def test_answers_of_one_reward_teach_where_they_differ_in_cost():
    found = limited(PPO(), [(1.0, 1.0), (1.0, 1.0)], [[0.0, 1.0], [2.0, 2.0]], [[1, 1], [1, 1]], [0.0] * 4, [0.0] * 4, [0.0] * 4, 1.0)
    assert found.flat.tolist() == [False, True]


def test_what_either_critic_explains_is_said():
    given = {"advantage": [0.0] * 2, "return": [2.0, 0.0], "expected": [1.5, 0.5], "share": [1.0] * 2, "cost_return": [1.0, 0.0], "cost_expected": [1.0, 0.0]}
    group = parts([(1.0, 0.0)], [[1, 1]], {n: torch.tensor(v) for n, v in given.items()})
    said = PPO().metrics(group.with_tokens(torch.tensor([-1.0, -1.0]), torch.zeros(2), torch.zeros(2)))
    assert (said["explained"], said["cost_explained"]) == (approx(0.75), approx(1.0))


@pytest.mark.parametrize("options", [{"beta": -1.0}, {"clip_ratio": 1.0}, {"value": 0.0}, {"value_clip": 0.0}, {"gamma": 1.1}, {"decay": -0.1}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        registry.create("align/ppo", options)
