from math import exp

import pytest
import torch

from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout
from fiducial.training.scorecard import comparisons, figures, pair_mean

approx = pytest.approx


def groups(*rows, lengths=None):
    """Groups from (targets, rewards)."""
    made = []
    for targets, rewards in rows:
        count = len(targets or rewards)
        made.append(Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="x"),) * count, targets=targets, rewards=rewards))
    return layout(made, lengths or [[1] * len(g.completions) for g in made])


def test_targets_compare_two_completions_by_their_shares():
    found = comparisons(groups(((0.6, 0.2, 0.2), None)), "targets")
    assert found.preference[0].tolist() == [approx([0.5, 0.75, 0.75]), approx([0.5, 0.5, 0.5]), approx([0.5, 0.5, 0.5])]
    assert found.known[0].tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_two_that_cannot_be_the_best_say_nothing():
    assert int(comparisons(groups(((1.0, 0.0, 0.0), None)), "targets").known.sum()) == 2


def test_rewards_without_targets_order_all_completions_and_not_only_the_best_against_the_others():
    found = comparisons(groups((None, (1.0, 3.0, 2.0)), (None, (3.0, 2.0, 2.0)), (None, (2.0, 1.0, None))), "targets")
    assert found.preference[0, 0].tolist() == [0.5, 0.0, 0.0]  # 3 > 1 and 2 > 1
    assert found.preference[0, 1, 2] == 1.0  # 3 > 2
    assert found.known.sum((1, 2)).tolist() == [3, 2, 2]


def test_rewards_compare_by_their_order_and_ties_and_unknown_ones_say_nothing():
    found = comparisons(groups((None, (1.0, 3.0, 3.0, None))), "rewards")
    assert found.known[0].nonzero().tolist() == [[0, 1], [0, 2]]
    assert found.preference[0, 0].tolist() == [0.5, 0.0, 0.0, 0.5]
    assert found.gap[0, 0, :3].tolist() == [0.0, 2.0, 2.0]


def test_places_without_a_completion_are_in_no_pair():
    found = comparisons(groups(((1.0, 0.0), None), ((0.5, 0.3, 0.2), None)), "targets")
    assert found.known.sum((1, 2)).tolist() == [1, 3]


def test_a_mean_over_no_pairs_is_zero():
    assert pair_mean(torch.full((1, 2, 2), 5.0), torch.zeros(1, 2, 2, dtype=torch.bool)).tolist() == [0.0]


def test_the_figures_of_three_pairs_by_hand():
    parts = groups(((1.0, 0.0), None), ((0.0, 1.0), None), ((0.9, 0.1), None), lengths=[[2, 1], [3, 1], [1, 4]])
    found = figures(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]]), parts, "targets")
    assert found["accuracy"] == approx(2 / 3)
    assert found["margin"] == approx((2.0 - 1.0 + 0.5) / 3)
    assert found["score"] == approx(3.5 / 6)
    # confidences 0.881 (right), 0.731 (wrong), 0.622 (right), each alone in its bin
    s = [1 / (1 + exp(-d)) for d in (2.0, 1.0, 0.5)]
    assert found["calibration_error"] == approx((1 - s[0] + s[1] + 1 - s[2]) / 3)
    assert found["accuracy_when_shorter"] == approx(1 / 2)  # the better one is shorter in the second and third pair


def test_scores_that_are_lengths_correlate_with_length_fully():
    parts = groups(((1.0, 0.0), None), ((1.0, 0.0), None), lengths=[[2, 1], [7, 3]])
    assert figures(parts.length.float(), parts, "targets")["length_correlation"] == approx(1.0)
    assert "length_correlation" not in figures(torch.zeros(2, 2), parts, "targets")


def test_length_is_correlated_by_rank_and_once_more_with_the_label_held_fixed():
    """Ranks of scores 1 2 3 4, of lengths 2 1 3 4 and of labels 1.5 1.5 3.5 3.5: by d^2, rho = 1 - 6 * 2 / 60 = 0.8."""
    parts = groups(((0.0, 1.0), None), ((0.0, 1.0), None), lengths=[[5, 7], [3, 900]])
    found = figures(torch.tensor([[1.0, 3.0], [2.0, 400.0]]), parts, "targets")
    assert found["length_correlation"] == approx(0.8)
    # with the label both ranks correlate by 2 / sqrt(5), so that (0.8 - 0.8) / (1 - 0.8) is left
    assert found["length_correlation_at_equal_label"] == approx(0.0, abs=1e-6)


def test_pairs_of_equal_length_are_those_within_a_tenth_of_the_longer():
    parts = groups(*[((1.0, 0.0), None)] * 3, lengths=[[10, 9], [90, 100], [8, 10]])
    found = figures(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), parts, "targets")
    assert (found["accuracy"], found["accuracy_at_equal_length"]) == (approx(2 / 3), approx(1 / 2))
    assert "accuracy_at_equal_length" not in figures(torch.tensor([[1.0, 0.0]]), groups(((1.0, 0.0), None), lengths=[[1, 2]]), "targets")


def test_a_tie_of_scores_counts_half_and_is_reported_apart():
    found = figures(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), groups(*[((1.0, 0.0), None)] * 2), "targets")
    assert (found["accuracy"], found["ties"]) == (0.75, 0.5)


def test_soft_labels_of_one_half_order_nothing():
    assert "accuracy" not in figures(torch.tensor([[1.0, 0.0]]), groups(((0.5, 0.5), None)), "targets")


def test_no_completions_are_a_data_error():
    with pytest.raises(DataError, match="nothing to score"):
        figures(torch.zeros(0, 1), groups(), "targets")
