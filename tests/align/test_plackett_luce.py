from itertools import permutations
from math import exp, nan

import numpy as np
import pytest

from fiducial.align.dpo import DPO
from fiducial.align.plackett_luce import PlackettLuce
from fiducial.core import registry
from fiducial.core.errors import ConfigError, DataError

approx = pytest.approx


def test_the_loss_is_that_of_the_formula(group):
    rng = np.random.default_rng(0)
    logp, ref, rewards = -rng.uniform(1, 9, (3, 6, 4)).astype("float32")
    policy = group(*logp.tolist(), rewards=rewards.tolist())
    by_hand = []
    for row, base, reward in zip(logp.astype("float64"), ref.astype("float64"), rewards, strict=True):
        s = 0.3 * (row - base)[np.argsort(-reward)]  # from the best to the worst
        by_hand.append(-sum(s[k] - np.log(np.exp(s[k:]).sum()) for k in range(4)))
    assert PlackettLuce(beta=0.3, labels="rewards")(policy, group(*ref.tolist())).tolist() == approx(by_hand, rel=1e-5)


def test_the_probabilities_of_all_rankings_sum_to_one(group):
    policy, reference = [(-3.0, -5.0, -4.0)], group((-4.0, -4.0, -4.0))
    losses = [PlackettLuce(beta=0.7, labels="rewards")(group(*policy, rewards=[list(r)]), reference).item() for r in permutations((1.0, 2.0, 3.0))]
    assert sum(exp(-loss) for loss in losses) == approx(1.0)


def test_with_two_completions_it_is_dpo(group, pull):
    policy, reference = group((-3.0, -9.0), grad=True), group((-4.0, -4.0))
    assert pull(PlackettLuce(), policy, reference)[1] == approx(pull(DPO(), policy, reference)[1])
    assert pull(PlackettLuce(), policy, reference)[0] == approx(pull(DPO(), policy, reference)[0])


def test_the_gradient_is_the_share_of_each_draw_less_what_was_drawn(group, pull):
    policy = group((2.0, 0.0, -1.0), rewards=[[3.0, 2.0, 1.0]], grad=True)
    gradient, _ = pull(PlackettLuce(beta=1.0, labels="rewards"), policy, group((0.0, 0.0, 0.0)))
    a, b, c = exp(2), 1.0, exp(-1)
    first, second = a + b + c, b + c
    assert gradient == approx([a / first - 1, b / first + b / second - 1, c / first + c / second])


def test_order_and_padding_do_not_matter(group):
    objective = PlackettLuce(labels="rewards")
    one = objective(group((-3.0, -9.0, -5.0), rewards=[[3.0, 1.0, 2.0]]), group((-4.0, -4.5, -4.2)))
    other = objective(group((-9.0, -5.0, -3.0), rewards=[[1.0, 2.0, 3.0]]), group((-4.5, -4.2, -4.0)))
    padded = group((-3.0, -9.0, -5.0, 0.0), rewards=[[3.0, 1.0, 2.0, nan]], mask=[[True, True, True, False]])
    assert one.item() == approx(other.item()) == approx(objective(padded, group((-4.0, -4.5, -4.2, 0.0))).item())


def test_a_hard_target_says_which_is_the_best_and_no_more(group):
    # the rest tie: what is left is the softmax of the first
    s = np.array([0.1 * x for x in (1.0, -5.0, 2.0)])
    loss = PlackettLuce()(group((1.0, -5.0, 2.0)), group((0.0, 0.0, 0.0)))
    assert loss.item() == approx(np.log(np.exp(s).sum()) - s[0])


def test_ties_are_not_compared_and_a_group_of_equals_is_worth_nothing(group, pull):
    objective, reference = PlackettLuce(beta=1.0, labels="rewards"), group((0.0, 0.0, 0.0))
    loss = objective(group((2.0, 1.0, 0.0), rewards=[[1.0, 1.0, 0.0]]), reference)
    assert loss.item() == approx(np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)))  # either above the third
    gradient, loss = pull(objective, group((2.0, 1.0, 0.0), rewards=[[1.0, 1.0, 1.0]], grad=True), reference)
    assert (gradient, loss) == ([0.0, 0.0, 0.0], 0.0)


def test_a_completion_without_a_reward_takes_no_part(group, pull):
    objective = PlackettLuce(labels="rewards")
    gradient, loss = pull(objective, group((-3.0, -1.0, -9.0), rewards=[[1.0, nan, 0.0]], grad=True), group((-4.0, -4.0, -4.0)))
    assert loss == approx(DPO()(group((-3.0, -9.0)), group((-4.0, -4.0))).item())
    assert gradient[1] == 0.0


def test_rewards_that_are_missing_altogether_are_a_data_error(group):
    three = group((-1.0, -2.0, -3.0))
    with pytest.raises(DataError, match="align/plackett_luce reads rewards"):
        PlackettLuce(labels="rewards")(three, three)


def test_far_out_it_is_linear_and_finite(group, pull):
    gradient, loss = pull(PlackettLuce(beta=0.1), group((-500.0, 0.0, 0.0), grad=True), group((0.0, 0.0, 0.0)))
    assert loss == approx(50 + np.log(2))
    assert gradient == approx([-0.1, 0.05, 0.05])


def test_its_figures_follow_the_labels_it_reads(group):
    policy = group((-3.0, -9.0), rewards=[[0.0, 1.0]])
    assert PlackettLuce().metrics(policy, group((-4.0, -4.0)))["accuracy"] == 1.0
    assert PlackettLuce(labels="rewards").metrics(policy, group((-4.0, -4.0)))["accuracy"] == 0.0


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"labels": "votes"}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="labels"):
        registry.create("align/plackett_luce", options)
