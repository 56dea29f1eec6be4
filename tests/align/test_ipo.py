import numpy as np
import pytest

from fiducial.align.ipo import IPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError

approx = pytest.approx


@pytest.mark.parametrize("normalized", [True, False])
def test_the_loss_is_that_of_the_formula(pairs, normalized):
    first, second = pairs.w - pairs.w_ref, pairs.l - pairs.l_ref
    h = first / pairs.w_len - second / pairs.l_len if normalized else first - second
    by_hand = pairs.p * np.square(h - 1 / 0.6) + (1 - pairs.p) * np.square(-h - 1 / 0.6)
    assert IPO(beta=0.3, length_normalized=normalized)(pairs.policy, pairs.reference).tolist() == approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("margin", [-500.0, -2.0, 0.0, 5.0, 500.0])
def test_the_gradient_is_twice_the_distance_from_the_margin_asked_for(group, pull, margin):
    gradient, loss = pull(IPO(beta=0.1, length_normalized=False), group((margin, 0.0), grad=True), group((0.0, 0.0)))
    assert gradient == approx([2 * (margin - 5), -2 * (margin - 5)])
    assert loss == approx((margin - 5) ** 2)


def test_each_side_is_divided_by_its_own_length(group, pull):
    policy, reference = group((-6.0, -9.0), length=[[2, 3]], grad=True), group((-4.0, -3.0))
    # log-ratios -2 over 2 tokens and -6 over 3: h = -1 - (-2) = 1, against 1 / (2 * 0.1) = 5
    gradient, loss = pull(IPO(beta=0.1), policy, reference)
    assert loss == approx(16)
    assert gradient == approx([2 * -4 / 2, -2 * -4 / 3])


def test_the_margin_settles_at_one_half_over_beta(group, settled):
    first, second = settled(IPO(beta=0.25), group((0.0, 0.0)), rate=0.1)[0].tolist()
    assert first - second == approx(2.0)


def test_a_soft_label_settles_at_its_share_of_that(group, settled):
    # (2 * 0.8 - 1) / (2 * 0.25)
    first, second = settled(IPO(beta=0.25, length_normalized=False), group((0.0, 0.0), targets=[[0.8, 0.2]], length=[[3, 5]]), rate=0.1)[0].tolist()
    assert first - second == approx(1.2)


def test_a_beta_of_zero_is_a_config_error():
    with pytest.raises(ConfigError, match="beta"):
        registry.create("align/ipo", {"beta": 0.0})
