"""Advantages by hand; episodes of six tokens, so that a reward on the wrong one shows."""

import math

import pytest
import torch

from fiducial.training.advantages import batch_whitened, gae, group_normalised, leave_one_out, token_rewards, whiten

approx = pytest.approx
NAN = math.nan


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_each_answer_is_compared_with_the_mean_of_its_siblings():
    # 4 - (1 + 1) / 2 = 3; 1 - (4 + 1) / 2 = -1.5
    assert leave_one_out(rows([4.0, 1.0, 1.0])).values.tolist() == [approx([3.0, -1.5, -1.5])]


def test_a_group_is_brought_to_mean_zero_and_a_sample_deviation_just_below_one():
    # mean 2, sample deviation sqrt((4 + 1 + 1) / 2) = sqrt(3)
    found = group_normalised(rows([4.0, 1.0, 1.0]))
    assert found.values.tolist() == [approx([2 / (math.sqrt(3) + 1e-4), -1 / (math.sqrt(3) + 1e-4), -1 / (math.sqrt(3) + 1e-4)])]
    assert group_normalised(rows([4.0, 1.0, 1.0]), divide=False).values.tolist() == [approx([2.0, -1.0, -1.0])]


def test_a_group_baseline_then_one_spread_over_the_whole_batch():
    # centred 1, -1 and 3, -3: mean 0, sample variance 20 / 3
    found = batch_whitened(rows([2.0, 0.0], [7.0, 1.0])).values
    assert found.tolist() == [approx([math.sqrt(3 / 20), -math.sqrt(3 / 20)]), approx([3 * math.sqrt(3 / 20), -3 * math.sqrt(3 / 20)])]


@pytest.mark.parametrize("estimate", [leave_one_out, group_normalised, batch_whitened])
def test_advantages_of_a_group_add_up_to_nothing(estimate):
    found = estimate(rows([1.0, 5.0, -2.0, 0.5], [0.0, 0.0, 1.0, 0.0], [3.0, NAN, 4.0, 1.0]))
    assert found.values.sum(1).tolist() == approx([0.0, 0.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("estimate", [leave_one_out, group_normalised, batch_whitened])
def test_an_answer_that_was_not_scored_changes_nothing_for_the_others(estimate):
    with_it, without = estimate(rows([4.0, NAN, 1.0, 1.0])), estimate(rows([4.0, 1.0, 1.0]))
    assert with_it.values[0, [0, 2, 3]].tolist() == approx(without.values[0].tolist())
    assert with_it.values[0, 1] == 0
    assert with_it.usable.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("estimate", [leave_one_out, group_normalised, batch_whitened])
def test_the_only_scored_answer_has_nothing_to_be_compared_with(estimate):
    found = estimate(rows([NAN, 3.0], [NAN, NAN]))
    assert found.values.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert not found.usable.any()
    assert found.flat.tolist() == [True, True]


@pytest.mark.parametrize("estimate", [leave_one_out, group_normalised, batch_whitened])
def test_groups_of_one_reward_teach_nothing_and_are_counted(estimate):
    found = estimate(rows([0.1, 0.1, 0.1], [1.0, 0.0, NAN], [2.0, 2.0, NAN]))
    assert found.flat.tolist() == [True, False, True]
    assert found.flat_share == approx(2 / 3)
    assert found.values[0].abs().max() < 1e-9
    assert found.usable[0].all()


def test_no_groups_have_no_flat_ones():
    assert leave_one_out(torch.zeros(0, 4)).flat_share == 0.0


def test_whitening_counts_the_places_of_the_mask_alone():
    # of 1, 3 and (left out) 100: mean 2, sample variance 2
    mask = torch.tensor([[True, True, False]])
    assert whiten(rows([1.0, 3.0, 100.0]), mask).tolist() == [approx([-1 / math.sqrt(2), 1 / math.sqrt(2), 0.0])]
    assert whiten(rows([1.0, 3.0, 100.0]), mask, centre=False).tolist() == [approx([2 - 1 / math.sqrt(2), 2 + 1 / math.sqrt(2), 0.0])]


def test_whitening_one_value_or_equal_ones_gives_nothing():
    assert whiten(rows([5.0, 1.0]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert whiten(rows([5.0, 5.0]), torch.tensor([[True, True]])).tolist() == [[0.0, 0.0]]


def test_the_reward_stands_on_the_last_real_token_and_the_kl_on_each():
    kl = rows([0.1, 0.2, 0.0, 0.3, 9.0, 9.0], [1.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    # four tokens and reward 5; six tokens and reward -1
    found = token_rewards(torch.tensor([5.0, -1.0], dtype=torch.float64), kl, torch.tensor([4, 6]), beta=0.5)
    assert found.tolist() == [approx([-0.05, -0.1, 0.0, 4.85, 0.0, 0.0]), approx([-0.5, 0.0, 0.0, 0.0, 0.0, -2.0])]


def test_gae_of_an_episode_of_six_tokens():
    """gamma 1, decay 0.5, values 1, 2, 0, 1, 1, 2, reward 4 at the end.

    surprises: 2-1 = 1, 0-2 = -2, 1-0 = 1, 1-1 = 0, 2-1 = 1, 4-2 = 2
    from the end: 2, 1+1 = 2, 0+1 = 1, 1+0.5 = 1.5, -2+0.75 = -1.25, 1-0.625 = 0.375
    """
    values = rows([1.0, 2.0, 0.0, 1.0, 1.0, 2.0])
    advantages, returns = gae(rows([0.0, 0.0, 0.0, 0.0, 0.0, 4.0]), values, torch.tensor([6]), decay=0.5)
    assert advantages.tolist() == [approx([0.375, -1.25, 1.5, 1.0, 2.0, 2.0])]
    assert returns.tolist() == [approx([1.375, 0.75, 1.5, 2.0, 3.0, 4.0])]


def test_gae_does_not_see_beyond_the_end_of_a_shorter_episode():
    rewards, values = rows([0.0, 1.0, 7.0, 7.0]), rows([0.5, 0.5, 9.0, 9.0])
    short = gae(rewards[:, :2], values[:, :2], torch.tensor([2]))
    found = gae(rewards, values, torch.tensor([2]))
    assert found[0].tolist() == [approx([*short[0][0].tolist(), 0.0, 0.0])]
    assert found[1].tolist() == [approx([*short[1][0].tolist(), 0.0, 0.0])]


def test_gae_with_decay_one_and_no_values_is_the_discounted_sum_of_rewards():
    # 1 + 0.5 (0 + 0.5 * 4) = 2
    advantages, _ = gae(rows([1.0, 0.0, 4.0]), torch.zeros(1, 3, dtype=torch.float64), torch.tensor([3]), gamma=0.5, decay=1.0)
    assert advantages.tolist() == [approx([2.0, 2.0, 4.0])]
