from dataclasses import replace
from math import exp

import pytest
import torch

from fiducial.align.kto import KTO
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user

approx = pytest.approx


def sigmoid(x):
    return 1 / (1 + exp(-x))


def both(group, *ratios, rewards=None, pairs=(0.0,), **fields):
    """Policy and reference whose log-ratios, and those of mismatched pairs, are given."""
    rows = [(r,) if isinstance(r, float) else r for r in ratios]
    policy = group(*rows, rewards=rewards, grad=True, **fields)
    reference = policy.with_logp(torch.zeros(policy.logp.shape))
    return replace(policy, mismatched=torch.tensor(pairs)), replace(reference, mismatched=torch.zeros(len(pairs)))


def test_at_the_reference_every_answer_costs_half(group):
    policy, reference = both(group, 0.0, 0.0, rewards=[[1.0], [-1.0]])
    assert KTO()(policy, reference).tolist() == approx([0.5, 0.5])


def test_desirable_answers_should_lie_above_the_reference_point_and_others_below(group):
    policy, reference = both(group, 3.0, 3.0, rewards=[[1.0], [-1.0]], pairs=(1.0, 3.0))  # mean 2
    assert KTO(beta=0.5)(policy, reference).tolist() == approx([1 - sigmoid(0.5 * (3 - 2)), 1 - sigmoid(0.5 * (2 - 3))])


def test_the_reference_point_is_never_below_zero(group):
    policy, reference = both(group, 1.0, rewards=[[1.0]], pairs=(-4.0, 2.0))
    assert KTO(beta=1.0)(policy, reference).tolist() == approx([1 - sigmoid(1.0)])
    assert KTO().metrics(policy.with_logp(policy.logp.detach()), reference)["reference_point"] == 0.0


def test_the_gradient_is_that_of_a_sigmoid_with_the_reference_point_fixed(group):
    policy, reference = both(group, 1.5, -0.5, rewards=[[1.0], [-1.0]], pairs=(0.5,))
    KTO(beta=0.2, desirable_weight=2.0, undesirable_weight=3.0)(policy, reference).sum().backward()
    a, b = sigmoid(0.2 * 1.0), sigmoid(0.2 * -1.0)
    assert policy.logp.grad.flatten().tolist() == approx([-2.0 * 0.2 * a * (1 - a), 3.0 * 0.2 * b * (1 - b)])


def test_a_reward_of_zero_is_not_desirable(group):
    policy, reference = both(group, 1.0, rewards=[[0.0]])
    assert KTO(beta=1.0)(policy, reference).tolist() == approx([sigmoid(1.0)])


def test_without_rewards_the_target_says_which_is_desirable(group):
    policy, reference = both(group, (1.0, 1.0), targets=[[0.3, 0.7]])
    assert KTO(beta=1.0)(policy, reference).tolist() == approx([sigmoid(1.0) + 1 - sigmoid(1.0)])
    assert KTO().size(policy).tolist() == [2.0]


def test_apo_zero_measures_from_zero_and_reads_no_pairs(group):
    policy, reference = both(group, 1.0, 1.0, rewards=[[1.0], [-1.0]], pairs=(5.0,))
    assert KTO(beta=1.0, kind="apo_zero")(policy, reference).tolist() == approx([1 - sigmoid(1.0), sigmoid(1.0)])
    assert KTO(kind="apo_zero").reads == ()
    assert KTO().reads == ("mismatched",)


def test_without_pairs_or_reference_it_says_so(group):
    policy, reference = both(group, 1.0)
    with pytest.raises(ValueError, match="mismatched"):
        KTO()(replace(policy, mismatched=None), reference)
    with pytest.raises(ValueError, match="reference"):
        KTO()(policy)


def test_far_out_answers_have_no_pull_and_no_nan(group):
    policy, reference = both(group, 5e3, -5e3, rewards=[[1.0], [1.0]])
    loss = KTO()(policy, reference)
    assert loss.tolist() == approx([0.0, 1.0])
    loss.sum().backward()
    assert policy.logp.grad.tolist() == [[0.0], [0.0]]


def test_metrics_tell_both_sides_apart(group):
    policy, reference = both(group, 3.0, 1.0, -2.0, rewards=[[1.0], [1.0], [-1.0]], pairs=(0.5,))
    policy = policy.with_logp(policy.logp.detach())
    assert KTO().metrics(policy, reference) == approx({"reference_point": 0.5, "chosen_ratio": 2.0, "rejected_ratio": -2.0})


def test_answers_of_unknown_reward_are_left_out():
    completions = (Completion(text="a"), Completion(text="b"))
    group = Group(prompt=Prompt(messages=user("q")), completions=completions, rewards=(None, 1.0))
    assert [c.text for c in KTO().prepare(group).completions] == ["b"]
    assert KTO().prepare(group.model_copy(update={"rewards": None})).completions == completions


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rewards": (8.0, 3.0)}, [("a", 1.0), ("b", -1.0)]),  # columns score_chosen and score_rejected
        ({"rewards": (-3.0, -1.0)}, [("a", -1.0), ("b", 1.0)]),
        ({"rewards": (4.0, 2.0), "targets": (1.0, 0.0)}, [("a", 1.0), ("b", -1.0)]),
        ({"rewards": (1.0, 2.0), "targets": (1.0, 0.0)}, [("a", 1.0), ("b", -1.0)]),  # targets go first
        ({"rewards": (8.0, 8.0)}, []),
        ({"rewards": (None, None)}, []),
        ({"targets": (0.3, 0.7)}, [("a", -1.0), ("b", 1.0)]),
        ({"rewards": (3.0, 2.0, 1.0)}, [("a", 1.0), ("b", -1.0), ("c", -1.0)]),
        ({"rewards": (3.0, 3.0, 1.0)}, [("c", -1.0)]),
        ({"targets": (0.4, 0.35, 0.25)}, [("a", 1.0), ("b", -1.0), ("c", -1.0)]),
        ({"rewards": (-2.0,)}, [("a", -2.0)]),
        ({"rewards": (0.5,)}, [("a", 0.5)]),
    ],
)
def test_of_several_answers_the_preferred_one_is_desirable_whatever_their_scores(fields, expected):
    count = len(next(iter(fields.values())))
    found = KTO().prepare(Group(prompt=Prompt(messages=user("q")), completions=tuple(Completion(text=t) for t in "abc"[:count]), **fields))
    assert list(zip((c.text for c in found.completions), found.rewards, strict=True)) == expected


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": -0.1}, {"kind": "other"}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError):
        registry.create("align/kto", options)
