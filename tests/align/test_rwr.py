from math import exp, nan

import pytest
import torch

from fiducial.align.awr import AWR
from fiducial.align.rwr import RWR
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout

approx = pytest.approx


def made(logp, rewards, values=None):
    """One completion with the log-probability and the reward of each token, and the head before it."""
    group = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="x"),))
    leaves = [torch.tensor(x, requires_grad=True) for x in (logp, values or logp)]
    return layout([group], [[len(logp)]], {"value": torch.tensor(rewards)}).with_tokens(*leaves), *leaves


def test_tokens_count_by_the_exponential_of_their_reward():
    policy, leaf, _ = made([-1.0, -2.0], [0.5, -1.0])
    assert RWR(beta=0.5)(policy).item() == approx(exp(1.0) + 2 * exp(-2.0))
    RWR(beta=0.5)(policy).sum().backward()
    assert leaf.grad.tolist() == approx([-exp(1.0), -exp(-2.0)])


def test_a_weight_is_a_thousand_at_most():
    policy, *_ = made([-1.0], [1e6])
    assert RWR()(policy).item() == approx(1000.0)


@pytest.mark.parametrize("objective", [RWR(), AWR()], ids=["rwr", "awr"])
def test_tokens_of_unknown_reward_teach_nothing_and_are_not_counted(objective):
    policy, leaf, values = made([-1.0, -2.0], [nan, 0.0], [0.3, 0.3])
    assert objective.size(policy).tolist() == [1.0]
    objective(policy).sum().backward()
    assert leaf.grad[0] == 0.0
    assert leaf.grad.isfinite().all()
    assert values.grad is None or values.grad.tolist() == approx([0.0, 0.3])


def test_metrics_are_means():
    policy, leaf, _ = made([-1.0, -2.0], [0.0, 0.0])
    policy = policy.with_tokens(leaf.detach())
    assert RWR().metrics(policy) == approx({"logp_per_token": -1.5, "token_weight": 1.0})


@pytest.mark.parametrize(("name", "options"), [("align/rwr", {"beta": 0.0}), ("align/awr", {"beta": -1.0}), ("align/awr", {"value_weight": 1.0})])
def test_options_out_of_range_are_config_errors(name, options):
    with pytest.raises(ConfigError):
        registry.create(name, options)
