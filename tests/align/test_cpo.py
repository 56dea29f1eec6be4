from math import exp, log1p, nan

import numpy as np
import pytest

from fiducial.align.cpo import CPO
from fiducial.core import registry
from fiducial.core.errors import ConfigError

approx = pytest.approx


def test_the_loss_is_that_of_the_formula(pairs):
    z = 0.3 * (pairs.w - pairs.l)
    nll = -(pairs.p * pairs.w / pairs.w_len + (1 - pairs.p) * pairs.l / pairs.l_len)
    by_hand = pairs.p * np.logaddexp(0, -z) + (1 - pairs.p) * np.logaddexp(0, z) + 0.5 * nll
    assert CPO(beta=0.3, anchor=0.5)(pairs.policy).tolist() == approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("margin", [-500.0, -2.0, 3.0, 500.0])
def test_the_gradient_is_that_of_a_logistic_loss_and_of_the_anchor(group, pull, margin):
    gradient, _ = pull(CPO(beta=0.1, anchor=0.7), group((margin, 0.0), length=[[4, 2]], grad=True))
    slope = -0.1 / (1 + exp(0.1 * margin))
    assert gradient == approx([slope - 0.7 / 4, -slope], abs=1e-8)


def test_a_group_of_one_has_the_anchor_alone(group):
    loss = CPO(anchor=2.0)(group((-6.0, 0.0), (-1.0, -1.0), length=[[3, 0], [1, 1]], mask=[[True, False], [True, True]]))
    assert loss.tolist() == approx([2.0 * 6 / 3, 2.0 + log1p(1)])
    assert CPO(anchor=2.0)(group((-6.0,), length=[[3]])).tolist() == approx([4.0])
    assert CPO().metrics(group((-6.0,), length=[[3]])) == {}


def test_with_a_mean_over_tokens_the_anchor_counts_a_long_completion_as_its_tokens(group):
    # 8 nats over 4 tokens and 1 over 1: by sequences (2 + 1) / 2, by tokens 9 / 5
    groups = group((-8.0, 0.0), (-1.0, 0.0), length=[[4, 0], [1, 0]], mask=[[True, False]] * 2)
    assert CPO(anchor=2.0)(groups).mean().item() == approx(2 * 1.5)
    assert CPO(anchor=2.0, mean="token")(groups).mean().item() == approx(2 * 9 / 5)


def test_there_is_no_reference_in_its_figures(group):
    found = CPO(beta=0.1).metrics(group((-2.0, -8.0), (-3.0, -1.0)))
    assert found == {"accuracy": 0.5, "margin": approx(0.1 * (6 - 2) / 2), "chosen_logp": -2.5, "rejected_logp": -4.5}


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": nan}, {"anchor": -1.0}, {"mean": "constant"}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="beta"):
        registry.create("align/cpo", options)
