from math import exp, nan

import numpy as np
import pytest

from fiducial.align.dpo import DPO
from fiducial.align.robust_dpo import RobustDPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError

approx = pytest.approx


def sigmoid(x):
    return 1 / (1 + exp(-x))


def test_the_loss_is_that_of_the_formula(pairs):
    z, e = 0.3 * pairs.h, 0.2

    def hard(z):
        return ((1 - e) * np.logaddexp(0, -z) - e * np.logaddexp(0, z)) / (1 - 2 * e)

    by_hand = pairs.p * hard(z) + (1 - pairs.p) * hard(-z)
    assert RobustDPO(beta=0.3, label_smoothing=e)(pairs.policy, pairs.reference).tolist() == approx(by_hand, rel=1e-5, abs=1e-6)


def test_on_labels_flipped_at_the_known_rate_its_mean_is_dpo_on_the_true_ones(group):
    reference = group((-4.0, -4.0))
    flipped = RobustDPO(label_smoothing=0.3)(group((-3.0, -9.0), targets=[[0.7, 0.3]]), reference)
    assert flipped.item() == approx(DPO()(group((-3.0, -9.0)), reference).item())


def test_its_variance_over_flips_grows_with_the_square_of_the_margin(group):
    # z = 0.1 * 20 = 2, e = 0.2: the two losses differ by 2 / 0.6, and a coin of 0.2 and 0.8 has variance 0.16
    losses = [RobustDPO(label_smoothing=0.2)(group((margin, 0.0)), group((0.0, 0.0))).item() for margin in (20.0, -20.0)]
    assert losses[1] - losses[0] == approx(2 / 0.6)
    mean = 0.8 * losses[0] + 0.2 * losses[1]
    assert 0.8 * (losses[0] - mean) ** 2 + 0.2 * (losses[1] - mean) ** 2 == approx(0.2 * 0.8 * 2**2 / (1 - 0.4) ** 2)


@pytest.mark.parametrize("margin", [-500.0, -20.0, 0.0, 15.0, 500.0])
def test_the_gradient_never_reaches_zero(group, pull, margin):
    gradient, _ = pull(RobustDPO(beta=0.1, label_smoothing=0.2), group((margin, 0.0), grad=True), group((0.0, 0.0)))
    z = 0.1 * margin
    by_hand = -0.1 * (0.8 * sigmoid(-z) + 0.2 * sigmoid(z)) / 0.6
    assert gradient == approx([by_hand, -by_hand])
    assert gradient[0] <= -0.1 * 0.2 / 0.6 * 0.999


def test_the_loss_falls_without_bound(group):
    reference = group((0.0, 0.0))
    # at z = 50 the first term is 0 and the second -0.1 * 50 / 0.8
    assert RobustDPO(beta=0.1, label_smoothing=0.1)(group((500.0, 0.0)), reference).item() == approx(-0.1 * 50 / 0.8)
    assert RobustDPO(beta=0.1, label_smoothing=0.1)(group((-500.0, 0.0)), reference).item() == approx(0.9 * 50 / 0.8)


def test_without_flipped_labels_it_is_dpo(pairs):
    assert RobustDPO(label_smoothing=0.0)(pairs.policy, pairs.reference).tolist() == approx(DPO()(pairs.policy, pairs.reference).tolist())


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": nan}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="beta"):
        registry.create("align/robust_dpo", options)
