from dataclasses import replace
from math import exp, log1p

import pytest
import torch

from fiducial.align.cost_model import CostModel
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.data.formats import read_groups
from fiducial.training.objective import layout

approx = pytest.approx


def costs(*row, targets=None, rewards=None):
    group = Group(prompt=Prompt(messages=user("a")), completions=tuple(Completion(text="x") for _ in row), targets=targets, rewards=rewards)
    leaf = torch.tensor([row], requires_grad=True)
    return replace(layout([group], [[2] * len(row)]), scores=leaf), leaf


def softplus(x):
    return log1p(exp(x))


def test_the_loss_of_a_pair_is_the_papers_sum():
    """-log s(C_w - C_l) - log s(C_w) - log s(-C_l): the first completion is safe and better, the second unsafe and the more harmful one, w."""
    policy, _ = costs(-0.5, 1.5, rewards=(1.0, -1.0))
    assert CostModel()(policy).item() == approx(softplus(-(1.5 + 0.5)) + softplus(-1.5) + softplus(-0.5))


def test_the_gradient_has_its_closed_form_away_from_zero_too():
    """By hand: at the less harmful, safe answer s(C_l - C_w) + s(C_l); at the other, unsafe one -s(C_l - C_w) - s(-C_w)."""
    policy, leaf = costs(-0.5, 1.5, rewards=(1.0, -1.0))
    CostModel()(policy).sum().backward()
    sigmoid = lambda x: 1 / (1 + exp(-x))  # noqa: E731
    assert leaf.grad[0].tolist() == approx([sigmoid(-2.0) + sigmoid(-0.5), -sigmoid(-2.0) - sigmoid(-1.5)])
    assert leaf.grad[0].tolist() == approx([0.119203 + 0.377541, -0.119203 - 0.182426], abs=1e-6)


def test_the_more_harmful_answer_gets_the_higher_cost_and_the_safe_one_a_negative_one():
    policy, leaf = costs(0.0, 0.0, rewards=(1.0, -1.0))
    CostModel()(policy).sum().backward()
    assert leaf.grad[0].tolist() == approx([1.0, -1.0])  # 0.5 from the pair and 0.5 from the sign, each


def test_of_two_unsafe_answers_both_are_positive_and_the_worse_one_higher():
    policy, leaf = costs(0.0, 0.0, targets=(1.0, 0.0), rewards=(-1.0, -1.0))
    CostModel()(policy).sum().backward()
    assert leaf.grad[0].tolist() == approx([0.5 - 0.5, -0.5 - 0.5])


def test_without_labels_of_safety_only_the_pair_counts():
    policy, _ = costs(-0.5, 1.5)
    assert CostModel()(policy).item() == approx(softplus(-2.0))


def test_a_preference_without_scores_calls_no_answer_safe(tmp_path):
    """Of two harmful answers the chosen one is harmful too."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": -1}')
    bare, scored = map(CostModel().prepare, read_groups(file))
    assert (bare.rewards, bare.targets) == (None, (1.0, 0.0))
    assert scored.rewards == (1.0, -1.0)


def test_a_single_answer_is_taught_by_its_sign():
    policy, _ = costs(0.7, rewards=(-1.0,))
    assert CostModel(sign_weight=1.0)(policy).item() == approx(softplus(-0.7))


def test_metrics_count_the_right_side_of_zero_and_the_right_order():
    with torch.no_grad():
        found = CostModel().metrics(costs(0.2, 1.5, rewards=(1.0, -1.0))[0])
    assert found["sign_accuracy"] == 0.5
    assert found["accuracy"] == 1.0


def test_a_higher_cost_is_worse():
    assert CostModel.higher_is == "worse"


def test_a_negative_weight_is_a_config_error():
    with pytest.raises(ConfigError, match="sign_weight"):
        registry.create("align/cost_model", {"sign_weight": -1.0})
