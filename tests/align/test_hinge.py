import numpy as np
import pytest

from fiducial.align.hinge import Hinge
from fiducial.core import registry
from fiducial.core.errors import ConfigError

approx = pytest.approx


def test_the_loss_is_that_of_the_formula(pairs):
    z = 0.3 * pairs.h
    by_hand = pairs.p * np.maximum(0, 1 - z) + (1 - pairs.p) * np.maximum(0, 1 + z)
    assert Hinge(beta=0.3)(pairs.policy, pairs.reference).tolist() == approx(by_hand, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("margin", "slope", "value"), [(-500.0, -0.1, 51.0), (0.0, -0.1, 1.0), (9.9, -0.1, 0.01), (10.1, 0.0, 0.0), (500.0, 0.0, 0.0)])
def test_a_pair_counts_until_its_margin_is_one_over_beta(group, pull, margin, slope, value):
    gradient, loss = pull(Hinge(beta=0.1), group((margin, 0.0), grad=True), group((0.0, 0.0)))
    assert gradient == approx([slope, -slope])
    assert loss == approx(value, abs=1e-6)


def test_a_soft_label_still_asks_for_a_whole_margin(group, settled):
    # 0.7 max(0, 1 - z) + 0.3 max(0, 1 + z) falls up to z = 1 and rises after it
    first, second = ratios(group, settled)
    assert first - second == approx(1.0, abs=0.02)


def ratios(group, settled):
    ratio = group((0.0, 0.0), targets=[[0.7, 0.3]])
    for _ in range(300):  # steps of 0.005 * (0.7 - 0.3) until the kink, about which they then turn
        policy = ratio.with_logp(ratio.logp.detach().requires_grad_())
        Hinge(beta=1.0)(policy, group((0.0, 0.0))).sum().backward()
        ratio = ratio.with_logp(policy.logp.detach() - 0.005 * policy.logp.grad)
    return ratio.logp[0].tolist()


def test_a_beta_of_zero_is_a_config_error():
    with pytest.raises(ConfigError, match="beta"):
        registry.create("align/hinge", {"beta": 0.0})
