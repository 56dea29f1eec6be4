from math import exp, log, log1p, nan

import numpy as np
import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.align.dpop import DPOP
from fiducial.core import registry
from fiducial.core.errors import ConfigError

approx = pytest.approx


def sigmoid(x):
    return 1 / (1 + exp(-x))


def test_the_loss_is_that_of_the_formula(pairs):
    def hard(better, worse):
        return np.logaddexp(0, -(0.3 * (better - worse) - 0.3 * 7 * np.maximum(0, -better)))

    first, second = pairs.w - pairs.w_ref, pairs.l - pairs.l_ref
    by_hand = pairs.p * hard(first, second) + (1 - pairs.p) * hard(second, first)
    assert DPOP(beta=0.3, penalty=7.0)(pairs.policy, pairs.reference).tolist() == approx(by_hand, rel=1e-5)


def test_a_preferred_response_that_lost_probability_is_pulled_up_by_the_penalty_too(group, pull):
    # log-ratios -2 and -6: z = 0.1 * 4 - 0.1 * 5 * 2 = -0.6
    gradient, loss = pull(DPOP(beta=0.1, penalty=5.0), group((-2.0, -6.0), grad=True), group((0.0, 0.0)))
    assert loss == approx(log1p(exp(0.6)))
    assert gradient == approx([-0.1 * sigmoid(0.6) * 6, 0.1 * sigmoid(0.6)])


def test_one_that_gained_is_treated_as_by_dpo(group, pull):
    policy, reference = group((2.0, -6.0), grad=True), group((0.0, 0.0))
    assert pull(DPOP(), policy, reference) == pull(DPO(), policy, reference)
    assert DPOP(penalty=0.0)(group((-2.0, -6.0)), reference).item() == DPO()(group((-2.0, -6.0)), reference).item()


@pytest.mark.parametrize(("first", "loss"), [(500.0, 0.0), (-500.0, 300.0)])
def test_far_out_it_is_linear(group, pull, first, loss):
    # -500 nats: z = -50 and a penalty of 0.1 * 5 * 500 = 250
    gradient, found = pull(DPOP(beta=0.1, penalty=5.0), group((first, 0.0), grad=True), group((0.0, 0.0)))
    assert found == approx(loss, abs=1e-6)
    assert gradient == approx([-0.6, 0.1] if loss else [0.0, 0.0], abs=1e-6)


def test_where_dpo_lets_the_preferred_one_fall_the_penalty_holds_it(group):
    # three answers and one weight: what separates the first two raises the third most, so that the first loses probability
    features, reference = torch.tensor([1.0, 0.0, 5.0]), group((-log(3), -log(3)))

    def trained(objective):
        theta = torch.zeros(1, requires_grad=True)
        for _ in range(200):
            policy = reference.with_logp((theta * features).log_softmax(0)[:2].unsqueeze(0))
            (step,) = torch.autograd.grad(objective(policy, reference).sum(), theta)
            theta = (theta - 0.01 * step).detach().requires_grad_()
        return policy.logp[0, 0].item() + log(3)

    assert trained(DPO(beta=1.0)) < -1.0
    assert trained(DPOP(beta=1.0)) > -0.1


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"penalty": -1.0}, {"penalty": nan}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="penalty"):
        registry.create("align/dpop", options)
