from math import exp

import numpy as np
import pytest

from fiducial.align.apo import APO
from fiducial.core import registry
from fiducial.core.errors import ConfigError

approx = pytest.approx


def sigmoid(x):
    return 1 / (1 + exp(-x))


def both(z):
    """sigmoid(z) sigmoid(-z), the slope of a sigmoid."""
    return sigmoid(z) * sigmoid(-z)


@pytest.mark.parametrize("variant", ["zero", "down"])
def test_the_loss_is_that_of_the_formula(pairs, variant):
    def s(x):
        return 1 / (1 + np.exp(-0.3 * x))

    def hard(better, worse):
        return 1 - s(better) + s(worse) if variant == "zero" else s(better) + 1 - s(better - worse)

    first, second = pairs.w - pairs.w_ref, pairs.l - pairs.l_ref
    by_hand = pairs.p * hard(first, second) + (1 - pairs.p) * hard(second, first)
    assert APO(beta=0.3, variant=variant)(pairs.policy, pairs.reference).tolist() == approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (3.0, -4.0), (-7.0, 5.0)])
def test_zero_pushes_the_preferred_up_and_the_other_down(group, pull, first, second):
    gradient, _ = pull(APO(beta=0.1), group((first, second), grad=True), group((0.0, 0.0)))
    assert gradient == approx([-0.1 * both(0.1 * first), 0.1 * both(0.1 * second)])


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (3.0, -4.0), (-7.0, 5.0)])
def test_down_pushes_the_preferred_down_unless_the_margin_is_short(group, pull, first, second):
    gradient, _ = pull(APO(beta=0.1, variant="down"), group((first, second), grad=True), group((0.0, 0.0)))
    pair = 0.1 * both(0.1 * (first - second))
    assert gradient == approx([0.1 * both(0.1 * first) - pair, pair])


@pytest.mark.parametrize(("variant", "losses"), [("zero", [0.0, 2.0]), ("down", [1.0, 1.0])])
def test_the_loss_is_bounded_far_out(group, variant, losses):
    # zero: both where they should be, and both where they should not; down: up with a margin, and down without one
    policy = group((500.0, -500.0), (-500.0, 500.0))
    assert APO(beta=0.1, variant=variant)(policy, group((0.0, 0.0), (0.0, 0.0))).tolist() == approx(losses, abs=1e-6)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"variant": "up"}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="variant"):
        registry.create("align/apo", options)
