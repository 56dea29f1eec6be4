from math import log

import pytest
import torch

from fiducial.align.dft import DFT
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout

approx = pytest.approx


def made(*completions, targets=None):
    """One group with the log-probability of each token, as a leaf."""
    group = Group(prompt=Prompt(messages=user("a")), completions=tuple(Completion(text="x") for _ in completions), targets=targets)
    leaf = torch.tensor([x for c in completions for x in c], requires_grad=True)
    return layout([group], [[len(c) for c in completions]], {}).with_tokens(leaf), leaf


def test_each_token_counts_by_its_probability():
    policy, _ = made([log(0.5), log(0.1)])
    assert DFT()(policy).item() == approx(-0.5 * log(0.5) - 0.1 * log(0.1))


def test_the_weight_has_no_gradient_so_the_pull_is_the_probability():
    policy, leaf = made([log(0.5), log(0.1)])
    DFT()(policy).sum().backward()
    assert leaf.grad.tolist() == approx([-0.5, -0.1])


def test_soft_targets_weigh_the_completions():
    policy, leaf = made([log(0.5)], [log(0.2)], targets=(0.25, 0.75))
    DFT()(policy).sum().backward()
    assert leaf.grad.tolist() == approx([-0.25 * 0.5, -0.75 * 0.2])


def test_it_is_divided_by_the_tokens_of_preferred_completions():
    policy, _ = made([-1.0, -1.0], [-1.0], targets=(0.75, 0.25))
    assert DFT().size(policy).tolist() == approx([0.75 * 2 + 0.25])


def test_an_impossible_token_pulls_nothing_and_stays_finite():
    policy, leaf = made([-500.0])
    DFT()(policy).sum().backward()
    assert leaf.grad.tolist() == [0.0]


def test_metrics_are_means_per_token():
    policy, leaf = made([log(0.5), log(0.1)])
    assert DFT().metrics(policy.with_tokens(leaf.detach())) == approx({"logp_per_token": (log(0.5) + log(0.1)) / 2, "token_weight": 0.3})


def test_what_was_not_preferred_is_not_computed():
    group = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="x"), Completion(text="y")))
    assert [c.text for c in DFT().prepare(group).completions] == ["x"]


def test_without_tokens_it_says_so():
    with pytest.raises(ValueError, match="single tokens"):
        DFT()(layout([Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="x"),))], [[1]]))


def test_the_loss_of_a_certain_token_is_zero():
    policy, _ = made([0.0])
    assert DFT()(policy).item() == approx(0.0)
