from math import exp, log, log1p, nan

import numpy as np
import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError, DataError

approx = pytest.approx


def sigmoid(x):
    return 1 / (1 + exp(-x))


def test_loss_is_log_two_when_policy_equals_reference(group):
    both = group((-7.0, -3.0))
    assert DPO()(both, both).tolist() == approx([log(2)])


def test_beta_scales_the_margin(group):
    policy, reference = group((-2.0, -12.0)), group((-5.0, -5.0))
    assert DPO(beta=0.1)(policy, reference).item() == approx(log1p(exp(-1.0)))  # margin 3 - (-7) = 10, times 0.1
    assert DPO(beta=0.5)(policy, reference).item() == approx(log1p(exp(-5.0)))


@pytest.mark.parametrize("margin", [-30.0, -2.0, 0.0, 1.5, 30.0])
def test_the_gradient_is_minus_beta_times_sigmoid_of_minus_z(group, margin):
    policy = group((margin, 0.0), grad=True)
    DPO(beta=0.1)(policy, group((0.0, 0.0))).sum().backward()
    pull = -0.1 * sigmoid(-0.1 * margin)
    assert policy.logp.grad.tolist()[0] == approx([pull, -pull])


def test_a_soft_label_is_the_fixed_point_of_the_preference(group):
    # d loss / dz = sigmoid(z) - p, which is 0 at z = logit(p)
    p = 0.8
    policy = group((log(p / (1 - p)) / 0.1, 0.0), targets=[[p, 1 - p]], grad=True)
    loss = DPO(beta=0.1)(policy, group((0.0, 0.0)))
    assert loss.item() == approx(-p * log(p) - (1 - p) * log(1 - p))
    loss.sum().backward()
    assert policy.logp.grad.abs().max().item() < 1e-7


def test_a_soft_label_weighs_both_directions(group):
    policy = group((10.0, 0.0), targets=[[0.7, 0.3]], grad=True)
    loss = DPO(beta=0.1)(policy, group((0.0, 0.0)))
    assert loss.item() == approx(0.7 * log1p(exp(-1)) + 0.3 * log1p(exp(1)))
    loss.sum().backward()
    assert policy.logp.grad[0, 0].item() == approx(0.1 * (sigmoid(1) - 0.7))


def test_swapping_the_completions_and_the_label_changes_nothing(group):
    one = DPO(anchor=0.5)(group((-3.0, -9.0), targets=[[0.9, 0.1]], length=[[2, 3]]), group((-4.0, -4.0)))
    other = DPO(anchor=0.5)(group((-9.0, -3.0), targets=[[0.1, 0.9]], length=[[3, 2]]), group((-4.0, -4.0)))
    assert one.item() == approx(other.item())


def test_losses_far_out_are_linear_and_finite(group):
    policy = group((500.0, 0.0), (0.0, 500.0), grad=True)  # z = 50 and -50
    loss = DPO(beta=0.1)(policy, group((0.0, 0.0), (0.0, 0.0)))
    assert loss.tolist() == approx([0.0, 50.0], abs=1e-6)
    loss.sum().backward()
    assert policy.logp.grad.isfinite().all()
    assert policy.logp.grad[1].tolist() == approx([-0.1, 0.1])


def test_the_loss_is_that_of_the_formula(pairs):
    p, z = 0.8 * pairs.p + 0.2 * (1 - pairs.p), 0.3 * pairs.h
    nll = -(pairs.p * pairs.w / pairs.w_len + (1 - pairs.p) * pairs.l / pairs.l_len)
    by_hand = -p * np.log(1 / (1 + np.exp(-z))) - (1 - p) * np.log(1 / (1 + np.exp(z))) + 0.5 * nll
    assert DPO(beta=0.3, anchor=0.5, label_smoothing=0.2)(pairs.policy, pairs.reference).tolist() == approx(by_hand, rel=1e-5)


def test_label_smoothing_shrinks_the_label_towards_the_middle(group):
    # 0.9 smoothed by 0.1 is 0.9 * 0.9 + 0.1 * 0.1 = 0.82
    policy, reference = group((-3.0, -9.0), targets=[[0.9, 0.1]]), group((-4.0, -4.0))
    soft = group((-3.0, -9.0), targets=[[0.82, 0.18]])
    assert DPO(label_smoothing=0.1)(policy, reference).item() == approx(DPO()(soft, reference).item())


@pytest.mark.parametrize("margin", [-30.0, 0.0, 2.0, 500.0])
def test_with_label_smoothing_the_gradient_is_it_less_sigmoid_of_minus_z(group, pull, margin):
    gradient, _ = pull(DPO(beta=0.1, label_smoothing=0.2), group((margin, 0.0), grad=True), group((0.0, 0.0)))
    by_hand = 0.1 * (0.2 - sigmoid(-0.1 * margin))
    assert gradient == approx([by_hand, -by_hand], abs=1e-8)


def test_with_label_smoothing_the_margin_settles_at_its_logit(group, settled):
    first, second = settled(DPO(beta=0.5, label_smoothing=0.1), group((0.0, 0.0)), rate=10.0)[0].tolist()
    assert first - second == approx(log(0.9 / 0.1) / 0.5, rel=1e-4)


def test_with_a_soft_label_the_margin_settles_at_its_logit(group, settled):
    first, second = settled(DPO(beta=0.5), group((0.0, 0.0), targets=[[0.7, 0.3]]), rate=10.0)[0].tolist()
    assert first - second == approx(log(0.7 / 0.3) / 0.5, rel=1e-4)


def test_the_anchor_adds_the_negative_log_likelihood_per_token_of_the_preferred(group):
    policy, reference = group((-6.0, -1.0), length=[[3, 5]], grad=True), group((-6.0, -1.0))
    loss = DPO(anchor=2.0)(policy, reference)
    assert loss.item() == approx(log(2) + 2.0 * 6.0 / 3)
    loss.sum().backward()
    assert policy.logp.grad.tolist()[0] == approx([-0.05 - 2.0 / 3, 0.05])


def test_metrics_count_accuracy_displacement_and_margin_by_the_label(group):
    policy = group((-2.0, -8.0), (-9.0, -5.0), (-1.0, -1.5), targets=[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    reference = group((-5.0, -5.0), (-5.0, -5.0), (-0.5, -0.5))
    # chosen ratios 3, 0, -0.5; rejected -3, -4, -1; margins 6, 4, 0.5
    found = DPO(beta=0.1).metrics(policy, reference)
    assert found["accuracy"] == 1.0
    assert found["margin"] == approx(0.1 * 10.5 / 3)
    assert found["chosen_ratio"] == approx(2.5 / 3)
    assert found["rejected_ratio"] == approx(-8 / 3)
    assert found["displaced"] == approx(1 / 3)


def test_anything_but_two_completions_is_a_data_error_that_says_how_many(group):
    with pytest.raises(DataError, match=r"align/dpo compares two completions per prompt, but groups here have \[3\]"):
        DPO()(group((1.0, 2.0, 3.0)), group((1.0, 2.0, 3.0)))
    one = group((1.0, 0.0), (1.0, 2.0), mask=[[True, False], [True, True]])
    with pytest.raises(DataError, match=r"\[1, 2\]"):
        DPO()(one, one)


def test_a_missing_reference_is_no_silent_zero(group):
    with pytest.raises(ValueError, match="needs reference"):
        DPO()(group((1.0, 2.0)))


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": -1.0}, {"beta": nan}, {"anchor": -0.1}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="beta"):
        registry.create("align/dpo", options)


def test_training_on_one_pair_by_gradient_descent_makes_the_margin_grow(group):
    logits = torch.zeros(3, requires_grad=True)  # a policy over three answers
    reference = group((-log(3), -log(3)))
    for _ in range(50):
        policy = reference.with_logp(logits.log_softmax(0)[:2].unsqueeze(0))
        (pull,) = torch.autograd.grad(DPO(beta=1.0)(policy, reference).sum(), logits)
        logits = (logits - pull).detach().requires_grad_()
    assert logits[0] > logits[2] > logits[1]
