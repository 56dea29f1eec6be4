from math import exp, log

import pytest
import torch

from fiducial.training.kl import Pull, k1, k2, k3

approx = pytest.approx


def test_identical_policies_are_at_no_distance():
    nothing = torch.zeros(3)
    assert k1(nothing).tolist() == k2(nothing).tolist() == k3(nothing).tolist() == [0.0, 0.0, 0.0]


def test_each_estimate_of_one_ratio():
    ratio = torch.tensor([log(2.0), -log(2.0)], dtype=torch.float64)
    assert k1(ratio).tolist() == approx([log(2), -log(2)])
    assert k2(ratio).tolist() == approx([log(2) ** 2 / 2] * 2)
    assert k3(ratio).tolist() == approx([0.5 - 1 + log(2), 2 - 1 - log(2)])


def test_k1_and_k3_average_to_the_kl_of_a_coin():
    p, q = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    assert float((p * k1((p / q).log())).sum()) == approx(exact)
    assert float((p * k3((p / q).log())).sum()) == approx(exact)


def test_the_gradient_of_k2_on_fresh_samples_is_that_of_the_kl():
    q = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    (exact,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((p.detach() * k2((p / q).log())).sum(), logits)
    assert found.tolist() == approx(exact.tolist())


def test_a_far_outlier_stays_finite():
    assert k3(torch.tensor([-500.0])).isfinite().all()


def test_without_a_target_the_pull_stays():
    assert Pull(0.05).after(99.0, 512) == Pull(0.05)


def test_the_pull_follows_the_measured_kl_by_the_formula():
    pull = Pull(0.2, target=6.0, horizon=1000.0)
    # 6.6 / 6 - 1 = 0.1, 100 answers: 0.2 (1 + 0.1 * 100 / 1000)
    assert pull.after(6.6, 100).beta == approx(0.2 * 1.01)
    assert pull.after(60.0, 100).beta == approx(0.2 * 1.02)  # the error is cut at 0.2
    assert pull.after(0.0, 100).beta == approx(0.2 * 0.98)
    assert pull.after(6.0, 100).beta == approx(0.2)


def test_a_lasting_error_changes_the_pull_by_a_fifth_in_the_exponent_over_the_horizon():
    pull = Pull(1.0, target=1.0, horizon=1000.0)
    for _ in range(100):
        pull = pull.after(9.0, 10)
    assert pull.beta == approx(exp(0.2), rel=1e-3)
