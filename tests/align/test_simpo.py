from math import exp, log1p, nan

import numpy as np
import pytest

from fiducial.align.simpo import SimPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError

approx = pytest.approx


def test_the_loss_is_that_of_the_formula(pairs):
    h = pairs.w / pairs.w_len - pairs.l / pairs.l_len
    by_hand = pairs.p * np.logaddexp(0, -(2.5 * h - 2.5 * 0.4)) + (1 - pairs.p) * np.logaddexp(0, -(-2.5 * h - 2.5 * 0.4))
    assert SimPO(beta=2.5, gamma_beta_ratio=0.4)(pairs.policy).tolist() == approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("first", [-100.0, -6.0, -2.0, 100.0])
def test_the_gradient_goes_to_the_mean_over_tokens(group, pull, first):
    # z = 2 * (first / 4 - (-6 / 3)) - 1
    gradient, loss = pull(SimPO(beta=2.0, gamma_beta_ratio=0.5), group((first, -6.0), length=[[4, 3]], grad=True))
    z = 2 * (first / 4 + 2) - 1
    assert loss == approx(log1p(exp(-z)), abs=1e-7)
    assert gradient == approx([-2 / 4 / (1 + exp(z)), 2 / 3 / (1 + exp(z))], abs=1e-7)


def test_a_long_completion_of_the_same_mean_is_no_worse(group):
    short, long = group((-2.0, -4.0), length=[[1, 1]]), group((-2.0, -40.0), length=[[1, 10]])
    assert SimPO()(short).item() == approx(SimPO()(long).item())


def test_the_reference_is_not_looked_at(group):
    policy = group((-2.0, -4.0))
    assert SimPO()(policy, group((-9.0, -1.0))).item() == SimPO()(policy).item()


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"gamma_beta_ratio": -0.1}, {"gamma_beta_ratio": nan}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="gamma_beta_ratio"):
        registry.create("align/simpo", options)
