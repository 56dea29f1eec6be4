from math import log

import pytest
import torch

from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout
from fiducial.training.policy_gradient import clip_share, clipped, counts, known, shares

approx = pytest.approx


def parts(lengths, given=None):
    groups = [Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="b"),) * len(n)) for n in lengths]
    return layout(groups, lengths, given or {})


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # no reward for moving further
        (0.5, 2.0, -1.0, -1.0),  # but a way back
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clip_stops_what_goes_too_far_and_never_what_comes_back(ratio, advantage, loss, gradient):
    log_ratio = torch.tensor(log(ratio), requires_grad=True)
    found = clipped(log_ratio, torch.tensor(advantage), 0.2, 0.2)
    assert found.item() == approx(loss)
    found.backward()
    assert log_ratio.grad.item() == approx(gradient)


def test_a_ratio_beyond_all_bounds_stays_finite():
    log_ratio = torch.tensor([500.0, -500.0], requires_grad=True)
    clipped(log_ratio, torch.tensor([-1.0, 1.0]), 0.2, 0.2).sum().backward()
    assert log_ratio.grad.isfinite().all()


def test_the_clip_share_is_of_the_places_that_are_pushed():
    log_ratio, advantage = torch.tensor([0.5, -0.5, 0.5, 0.0, 9.0]), torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0])
    assert clip_share(log_ratio, advantage, 0.2, 0.2) == approx(2 / 4)
    assert clip_share(log_ratio, torch.zeros(5), 0.2, 0.2) == 0.0


def test_shares_and_counts_of_each_mean_go_together():
    some = parts([[2, 1], [4]])
    assert shares(some, "sequence", room=8).tolist() == approx([0.5, 0.5, 1.0, 0.25, 0.25, 0.25, 0.25])
    assert counts(some, "sequence").tolist() == [2.0, 1.0]
    assert shares(some, "token", room=8).tolist() == [1.0] * 7
    assert counts(some, "token").tolist() == [3.0, 4.0]
    assert shares(some, "constant", room=8).tolist() == [0.125] * 7
    assert counts(some, "constant").tolist() == [2.0, 1.0]


def test_what_is_not_known_is_named():
    some = parts([[1]], {"old": torch.zeros(1)})
    assert known(some, "old", objective="x")[1][0].tolist() == [0.0]
    with pytest.raises(ValueError, match="x learns from its own samples: nothing is known of advantage here"):
        known(some, "old", "advantage", objective="x")
