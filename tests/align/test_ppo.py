"""PPO by hand: episodes of six tokens and shorter ones."""

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


@pytest.mark.parametrize("options", [{"beta": -1.0}, {"clip_ratio": 1.0}, {"value": 0.0}, {"value_clip": 0.0}, {"gamma": 1.1}, {"decay": -0.1}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        registry.create("align/ppo", options)
