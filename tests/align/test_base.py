"""What holds for every objective over pairs, and for the figures that all preference objectives log."""

from math import nan

import pytest
import torch

from fiducial.align.base import PairObjective, labelled, masked_log_softmax, preference_metrics
from fiducial.core import registry
from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

approx = pytest.approx
OBJECTIVES = [card.name for card in registry.methods().values() if card.role == "Objective" and issubclass(registry.load(card.name), PairObjective)]


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return registry.create(request.param)


def test_the_objectives_over_pairs_are_found():
    assert {"align/dpo", "align/cpo", "align/robust_dpo", "align/ipo", "align/hinge", "align/orpo", "align/simpo", "align/apo", "align/dpop"} <= set(OBJECTIVES)


def test_swapping_the_completions_with_their_labels_changes_nothing(objective, group):
    targets, length = [[0.9, 0.1], [0.0, 1.0]], [[2, 3], [5, 4]]
    one = objective(group((-3.0, -9.0), (-8.0, -7.5), targets=targets, length=length), group((-4.0, -4.5), (-6.0, -7.0)))
    targets, length = [[0.1, 0.9], [1.0, 0.0]], [[3, 2], [4, 5]]
    other = objective(group((-9.0, -3.0), (-7.5, -8.0), targets=targets, length=length), group((-4.5, -4.0), (-7.0, -6.0)))
    assert one.tolist() == approx(other.tolist())


def test_a_soft_label_is_the_mean_of_both_hard_ones(objective, group):
    def loss(p):
        return objective(group((-3.0, -9.0), targets=[[p, 1 - p]], length=[[2, 3]]), group((-4.0, -4.5))).item()

    assert loss(0.7) == approx(0.7 * loss(1.0) + 0.3 * loss(0.0), rel=1e-5)


def test_losses_and_gradients_far_out_are_finite(objective, group):
    policy = group((-1.0, -501.0), (-501.0, -1.0), (-5e4, -1.0), (0.0, 0.0), grad=True)
    loss = objective(policy, group(*[(-1.0, -1.0)] * 4))
    assert loss.isfinite().all()
    loss.sum().backward()
    assert policy.logp.grad.isfinite().all()


def test_a_group_is_worth_the_same_whatever_stands_beside_it(objective, group):
    one = objective(group((-3.0, -9.0)), group((-4.0, -4.5)))
    two = objective(group((-3.0, -9.0), (-70.0, -1.0)), group((-4.0, -4.5), (-2.0, -2.0)))
    assert two[0].item() == one.item()


def test_three_completions_are_a_data_error_that_says_how_many(objective, group):
    three = group((-1.0, -2.0, -3.0))
    with pytest.raises(DataError, match=rf"{objective.name} compares two completions per prompt, but groups here have \[3\]"):
        objective(three, three)


def test_a_group_of_one_is_refused_where_nothing_is_learnt_from_it(objective, group):
    alone = group((-1.0, 0.0), (-1.0, -2.0), mask=[[True, False], [True, True]])
    if objective.least == 1:
        assert objective(alone, alone).isfinite().all()
    else:
        with pytest.raises(DataError, match=r"\[1, 2\]"):
            objective(alone, alone)


def test_a_missing_reference_is_no_silent_zero(objective, group):
    if objective.needs_reference:
        with pytest.raises(ValueError, match=f"{objective.name} needs reference"):
            objective(group((-1.0, -2.0)))
    else:
        assert objective(group((-1.0, -2.0))).tolist() == objective(group((-1.0, -2.0)), group((-9.0, -7.0))).tolist()


@pytest.mark.parametrize("name", [*OBJECTIVES, "align/exo", "align/plackett_luce"])
def test_a_model_that_is_trained_on_it_loses_less(name, tmp_path):
    texts = [("no", "yes, the first step is this"), ("I would rather not", "sure"), ("because it is", "he he he")]
    groups = [Group(prompt=Prompt(messages=user(f"why {n}?")), completions=tuple(Completion(text=t) for t in pair)) for n, pair in enumerate(texts)]
    options = TrainOptions(batch=3, epochs=4, learning_rate=3e-3, lora_rank=0, warmup=0.0)
    history = train(tiny(), groups, registry.create(name), options, folder=tmp_path).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["margin"] > history[0]["margin"]


def test_the_figures_of_a_pair_say_how_far_each_side_has_moved(objective, group):
    found = objective.metrics(group((-2.0, -8.0), length=[[2, 4]]), group((-5.0, -5.0)))
    assert found["accuracy"] == 1.0
    assert found["margin"] > 0
    assert (found["chosen_logp"], found["rejected_logp"]) == (-1.0, -2.0)
    assert ("displaced" in found) == objective.needs_reference
    if objective.needs_reference:
        assert (found["chosen_ratio"], found["rejected_ratio"], found["displaced"]) == (3.0, -3.0, 0.0)


def test_a_ranking_is_judged_pair_by_pair(group):
    # rewards 3 > 2 > 1: scores agree on (a, c) and (b, c), not on (a, b); margins -1, 2, 3
    policy = group((-4.0, -3.0, -6.0), length=[[4, 1, 2]])
    found = preference_metrics(policy.logp, policy, group((-5.0, -2.0, -2.0)), better=torch.tensor([[3.0, 2.0, 1.0]]))
    assert found["accuracy"] == approx(2 / 3)
    assert found["margin"] == approx((-1 + 2 + 3) / 3)
    assert found["chosen_logp"] == approx(-1.0)
    assert found["rejected_logp"] == approx((-3.0 - 3.0) / 2)
    assert found["chosen_ratio"] == approx(1.0)
    assert found["rejected_ratio"] == approx((-1 - 4) / 2)
    assert found["displaced"] == 0.0


def test_ties_and_unknown_rewards_order_nothing(group):
    policy = group((-4.0, -3.0, -6.0), (-1.0, -2.0, 0.0), mask=[[True] * 3, [True, True, False]])
    better = torch.tensor([[1.0, 1.0, nan], [nan, 1.0, nan]])
    assert preference_metrics(policy.logp, policy, None, better=better) == {}
    # two that tie above a third are both the best
    found = preference_metrics(policy.logp, policy, None, better=torch.tensor([[1.0, 1.0, 0.0], [nan, 1.0, nan]]))
    assert found["accuracy"] == 1.0
    assert found["margin"] == approx(2.5)
    assert found["chosen_logp"] == approx(-3.5)


def test_labels_leave_out_what_was_not_scored_and_refuse_a_group_without_any(group):
    found = labelled(group((0.0, 0.0), rewards=[[2.0, nan]]), "rewards", objective="align/exo")
    assert (found.value.tolist(), found.known.tolist()) == ([[2.0, 0.0]], [[True, False]])
    with pytest.raises(DataError, match="align/exo reads rewards, but 1 of 2 groups here have none"):
        labelled(group((0.0, 0.0), (0.0, 0.0), rewards=[[2.0, nan], [nan, nan]]), "rewards", objective="align/exo")


def test_a_masked_softmax_gives_unknown_places_neither_share_nor_gradient():
    score = torch.tensor([[1.0, 5.0, 1.0]], requires_grad=True)
    found = masked_log_softmax(score, torch.tensor([[True, False, True]]))
    assert found.tolist() == [[approx(-0.693147), 0.0, approx(-0.693147)]]
    found[0, 0].backward()
    assert score.grad.tolist() == [[approx(0.5), 0.0, approx(-0.5)]]
