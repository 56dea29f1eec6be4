"""GRPO by hand: two answers of two and one tokens, worked from the formula."""

from math import exp, log, nan

import pytest
import torch

from fiducial.align.grpo import GRPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout

approx = pytest.approx


def parts(rewards, lengths, given=None):
    """One group per row of rewards."""
    groups = [Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="b"),) * len(r), rewards=tuple(r)) for r in rewards]
    return layout(groups, lengths, given or {})


def taught(objective, rewards, lengths, old, reference=None, room=10):
    """Groups with their lessons, and the reference."""
    plain = parts(rewards, lengths)
    old = torch.tensor(old)
    before = plain.with_tokens(torch.tensor(reference) if reference is not None else old)
    lessons = objective.lessons(plain.with_tokens(old), before, room=room)
    return parts(rewards, lengths, {**lessons.given, "old": old}), before, lessons


def test_before_any_update_the_loss_is_minus_the_mean_advantage_which_is_nothing():
    objective = GRPO()
    group, reference, _ = taught(objective, [(1.0, 0.0)], [[2, 1]], [-1.0, -2.0, -3.0])
    assert objective(group.with_tokens(torch.tensor([-1.0, -2.0, -3.0])), reference).item() == approx(0.0, abs=1e-6)


def test_the_gradient_pushes_each_token_by_its_answers_advantage_over_its_length():
    objective = GRPO(beta=0.0)
    group, reference, _ = taught(objective, [(1.0, 0.0)], [[2, 1]], [-1.0, -2.0, -3.0])
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    objective(group.with_tokens(logp), reference).sum().backward()
    advantage = 0.5 / (0.5**0.5 + 1e-4)  # mean 0.5, sample deviation sqrt(0.5)
    assert logp.grad.tolist() == approx([-advantage / 2, -advantage / 2, advantage])
    assert objective.size(group).tolist() == [2.0]


def test_with_scale_batch_the_group_is_the_baseline_and_the_whole_step_the_scale():
    """REINFORCE++ with a baseline; answers of unequal length count alike in the scale, and a group of equal rewards as zeros."""
    objective = GRPO(beta=0.0, scale="batch")
    rewards, lengths = [(3.0, 1.0), (10.0, 4.0), (5.0, 5.0)], [[2, 1], [1, 3], [1, 1]]
    group, reference, found = taught(objective, rewards, lengths, [-1.0] * 9)
    # less the means 2, 7 and 5: 1, -1, 3, -3, 0, 0, whose mean is 0 and whose sample variance (1 + 1 + 9 + 9) / 5 = 4
    expected = [0.5, 0.5, -0.5, 1.5, -1.5, -1.5, -1.5, 0.0, 0.0]
    assert found.given["advantage"].tolist() == approx(expected, abs=1e-6)
    assert found.flat.tolist() == [False, False, True]
    logp = torch.full((9,), -1.0, requires_grad=True)
    objective(group.with_tokens(logp), reference).sum().backward()
    # each answer's advantage, shared out among its tokens
    assert logp.grad.tolist() == approx([-0.25, -0.25, 0.5, -1.5, 0.5, 0.5, 0.5, 0.0, 0.0], abs=1e-6)


def test_where_no_old_policy_is_known_this_one_drew_the_answers():
    objective = GRPO(beta=0.0)
    _, reference, lessons = taught(objective, [(1.0, 0.0)], [[2, 1]], [-1.0, -2.0, -3.0])
    first = parts([(1.0, 0.0)], [[2, 1]], lessons.given)
    logp = torch.tensor([-1.3, -2.2, -2.5], requires_grad=True)  # as far off as rounding in bfloat16 may be
    objective(first.with_tokens(logp), reference).sum().backward()
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    assert logp.grad.tolist() == approx([-advantage / 2, -advantage / 2, advantage])
    assert objective.metrics(first.with_tokens(logp.detach()), reference)["clipped"] == 0.0


def test_a_token_that_moved_beyond_the_clip_has_no_gradient():
    objective = GRPO(beta=0.0)
    group, reference, _ = taught(objective, [(1.0, 0.0)], [[2, 1]], [-1.0, -2.0, -3.0])
    logp = torch.tensor([-1.0 + log(1.3), -2.0 + log(1.1), -3.0 + log(0.7)], requires_grad=True)
    loss = objective(group.with_tokens(logp), reference)
    a = 0.5 / (0.5**0.5 + 1e-4)
    assert loss.item() == approx(-(1.2 * a + 1.1 * a) / 2 + 0.8 * a)
    loss.sum().backward()
    assert logp.grad.tolist() == approx([0.0, -1.1 * a / 2, 0.0])
    assert objective.metrics(group.with_tokens(logp.detach()), reference)["clipped"] == approx(2 / 3)


def test_the_kl_term_is_k3_of_each_token_times_its_ratio():
    objective = GRPO(beta=0.5, scale="none")
    group, reference, _ = taught(objective, [(1.0, 1.0)], [[1, 1]], [-1.0, -1.0], reference=[-1.0 - log(2), -1.0 + log(2)])
    loss = objective(group.with_tokens(torch.tensor([-1.0, -1.0])), reference)
    # l = log 2: 1/2 - 1 + log 2; l = -log 2: 2 - 1 - log 2
    assert loss.item() == approx(0.5 * ((exp(-log(2)) - 1 + log(2)) + (exp(log(2)) - 1 - log(2))))


@pytest.mark.parametrize(
    ("mean", "size", "expected"), [("sequence", 4.0, [1 / 2, 1, 1, 1 / 3]), ("token", 7.0, [1.0, 1.0, 1.0, 1.0]), ("constant", 4.0, [0.1] * 4)]
)
def test_each_mean_shares_the_loss_out_in_its_own_way(mean, size, expected):
    objective = GRPO(beta=0.0, scale="none", mean=mean)
    rewards, lengths = [(1.0, 0.0), (1.0, 0.0)], [[2, 1], [1, 3]]
    group, reference, _ = taught(objective, rewards, lengths, [-1.0] * 7)
    logp = torch.full((7,), -1.0, requires_grad=True)
    objective(group.with_tokens(logp), reference).sum().backward()
    pulled = [logp.grad[i].item() / sign / -0.5 for i, sign in ((0, 1), (2, -1), (3, 1), (4, -1))]
    assert pulled == approx(expected)
    assert objective.size(group).sum().item() == size


def test_a_group_of_equal_rewards_is_counted_and_teaches_nothing():
    objective = GRPO(beta=0.0)
    group, reference, lessons = taught(objective, [(1.0, 1.0), (1.0, 0.0)], [[1, 1], [1, 1]], [-1.0] * 4)
    logp = torch.full((4,), -1.0, requires_grad=True)
    objective(group.with_tokens(logp), reference).sum().backward()
    assert lessons.flat.tolist() == [True, False]
    assert logp.grad[:2].tolist() == [0.0, 0.0]


def test_demonstrations_are_imitated_and_count_for_nothing_in_the_mean():
    objective = GRPO(beta=0.0)
    given = {"old": [-1.0, -1.0, 0.0, 0.0], "advantage": [1.0, -1.0, 0.0, 0.0], "share": [1.0, 1.0, 0.0, 0.0], "imitate": [0.0, 0.0, 0.25, 0.25]}
    group = parts([(1.0, 0.0), (1.0,)], [[1, 1], [2]], {name: torch.tensor(v) for name, v in given.items()})
    logp = torch.tensor([-1.0, -1.0, -3.0, -5.0], requires_grad=True)
    loss = objective(group.with_tokens(logp), group.with_tokens(logp.detach()))
    assert loss.tolist() == approx([0.0, 2.0])
    assert objective.size(group).tolist() == [2.0, 0.0]
    loss.sum().backward()
    assert logp.grad.tolist() == approx([-1.0, 1.0, -0.25, -0.25])


def test_data_that_was_not_drawn_is_refused():
    group = parts([(1.0, 0.0)], [[1, 1]])
    with pytest.raises(ValueError, match="align/grpo learns from its own samples: nothing is known of advantage, share"):
        GRPO()(group.with_tokens(torch.zeros(2)), group)


@pytest.mark.parametrize("options", [{"beta": -0.1}, {"beta": nan}, {"clip_low": 1.0}, {"clip_high": 0.0}, {"mean": "median"}, {"scale": "all"}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="align/grpo"):
        registry.create("align/grpo", options)
