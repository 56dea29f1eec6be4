from math import exp

import pytest
import torch

from fiducial.align.awr import AWR
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training.loop import train
from fiducial.training.objective import layout
from fiducial.training.options import TrainOptions

approx = pytest.approx


def made(logp, rewards, values):
    group = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="x"),))
    leaves = [torch.tensor(x, requires_grad=True) for x in (logp, values)]
    return layout([group], [[len(logp)]], {"value": torch.tensor(rewards)}).with_tokens(*leaves), *leaves


def test_only_what_a_reward_has_above_expectation_counts():
    policy, logp, values = made([-1.0, -2.0], [0.5, -1.0], [0.5, 0.0])
    loss = AWR(beta=0.5, value_weight=0.25)(policy)
    # advantages 0 and -1, so weights 1 and exp(-2); errors 0 and 1
    assert loss.item() == approx(0.75 * (1.0 + 2 * exp(-2.0)) + 0.25 * 1.0)
    loss.sum().backward()
    assert logp.grad.tolist() == approx([-0.75, -0.75 * exp(-2.0)])
    assert values.grad.tolist() == approx([0.0, 0.25 * 2 * (0.0 + 1.0)])  # the weight has no gradient


def test_without_the_heads_values_it_says_so():
    group = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="x"),))
    with pytest.raises(ValueError, match="values before tokens"):
        AWR()(layout([group], [[1]], {"value": torch.ones(1)}).with_tokens(torch.zeros(1)))


def test_the_head_learns_what_rewards_to_expect(tmp_path):
    groups = [Group(prompt=Prompt(messages=user(q)), completions=(Completion(text="answer"),), rewards=(r,)) for q, r in (("good", 1.0), ("bad", -1.0))]
    result = train(tiny(), groups, AWR(), TrainOptions(epochs=30, batch=2, learning_rate=1e-2, lora_rank=4), folder=tmp_path)
    assert result.history[-1]["value_error"] < 0.2 * result.history[0]["value_error"]
