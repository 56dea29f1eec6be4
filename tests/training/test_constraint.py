from math import exp

import pytest
import torch

from fiducial.training.advantages import leave_one_out
from fiducial.training.constraint import Multiplier, balanced

approx = pytest.approx


def test_a_cost_above_the_limit_raises_the_weight_and_one_below_lowers_it():
    start = Multiplier(limit=0.0, weight=1.0, delay=0)
    # log 1 + 0.1 * 1 * (0.5 - 0)
    assert start.after([0.5, 0.5], 0).weight == approx(exp(0.05))
    assert start.after([-0.5], 0).weight == approx(exp(-0.05))
    assert start.after([0.0], 0).weight == approx(1.0)


def test_the_weight_never_passes_its_bound():
    assert Multiplier(limit=-0.5, weight=10.0, most=20.0, delay=0).after([1e9], 0).weight == approx(20.0)


def test_in_the_delay_costs_are_collected_and_the_weight_stays():
    once = Multiplier(limit=0.0, weight=2.0, delay=1).after([4.0], 0)
    assert (once.weight, once.mean) == (2.0, 4.0)
    assert once.after([2.0], 1).weight == approx(2 * exp(0.1 * 2 * 3.0))  # the mean of 4 and 2


def test_the_mean_is_over_the_last_128_answers():
    old = Multiplier().after([100.0] * 200, 0)
    assert old.after([0.0] * 128, 0).mean == 0.0


def test_without_a_cost_nothing_moves():
    assert Multiplier(delay=0).after([], 5).weight == 10.0


def test_a_weight_outside_its_bounds_is_refused():
    with pytest.raises(ValueError, match="got weight 30"):
        Multiplier(weight=30.0)


def test_cost_is_subtracted_by_its_weight_and_the_sum_kept_in_size():
    assert balanced(2.0, 1.0, 3.0) == approx(-0.25)  # (2 - 3 * 1) / 4
    assert balanced(2.0, 1.0, 0.0) == 2.0
    assert balanced(2.0, None, 1.0) is None
    assert balanced(None, 1.0, 1.0) is None


def test_the_advantage_of_a_balanced_reward_is_the_balance_of_the_advantages():
    reward, cost = [2.0, 0.0, 1.0], [1.0, 0.0, 4.0]
    both = torch.tensor([[balanced(r, c, 3.0) for r, c in zip(reward, cost, strict=True)]])
    expected = (leave_one_out(torch.tensor([reward])).values - 3 * leave_one_out(torch.tensor([cost])).values) / 4
    assert torch.allclose(leave_one_out(both).values, expected)


def test_the_weight_falls_to_a_floor_from_which_it_comes_back():
    # 10 and a gap of -1000: log 10 - 0.1 * 10 * 1000 is far below the smallest number that exp gives
    cheap = Multiplier(delay=0).after([-1000.5], 0)
    assert cheap.weight == approx(0.01)
    assert cheap.after([-1000.5], 1).weight == approx(0.01)
    # the mean of -1000.5 and 4999.5 is 1999.5, 2000 above the limit: 0.1 * 0.01 * 2000 = 2
    assert cheap.after([4999.5], 1).weight == approx(0.01 * exp(2))
    small = Multiplier(weight=1e-4, delay=0)
    assert small.after([-1000.5], 0).weight == approx(1e-4)
