"""What an objective sees."""

import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import examples, layout, preferred, shares, sides, unscored


def group(count, **fields):
    return Group(prompt=Prompt(messages=user("a")), completions=tuple(Completion(text="x") for _ in range(count)), **fields)


def test_groups_of_different_size_are_padded_and_masked():
    parts = layout([group(1), group(3, targets=(0.2, 0.3, 0.5), weight=2.0)], [[4], [5, 6, 7]])
    assert parts.mask.tolist() == [[True, False, False], [True, True, True]]
    assert parts.length.tolist() == [[4, 0, 0], [5, 6, 7]]
    assert torch.allclose(parts.targets, torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))
    assert parts.weight.tolist() == [1.0, 2.0]


def test_unknown_rewards_are_nan():
    parts = layout([group(2, rewards=(1.5, None)), group(2)], [[1, 1], [1, 1]])
    assert parts.rewards[0, 0] == 1.5
    assert parts.rewards.isnan().tolist() == [[False, True], [True, True]]


def test_the_first_completion_is_preferred_where_the_group_does_not_say():
    assert layout([group(2)], [[1, 1]]).targets.tolist() == [[1.0, 0.0]]


def test_selecting_keeps_the_given_order():
    parts = layout([group(1, weight=w) for w in (1.0, 2.0, 3.0)], [[1], [2], [3]])
    chosen = parts.select([2, 0])
    assert chosen.weight.tolist() == [3.0, 1.0]
    assert chosen.length.tolist() == [[3], [1]]


def with_tokens():
    """Two groups of two and one completions, with their tokens numbered 0 to 6."""
    parts = layout([group(2), group(1)], [[2, 1], [4]], {"number": torch.arange(7.0)})
    return parts.with_tokens(torch.arange(7.0))


def test_tokens_are_laid_out_by_group_completion_and_position():
    tokens = with_tokens().tokens
    assert tokens.group.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert tokens.completion.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert tokens.position.tolist() == [0, 1, 0, 0, 1, 2, 3]


def test_sums_over_tokens_are_those_of_completions_and_numbers_of_completions_spread_over_tokens():
    parts = with_tokens()
    assert parts.logp.tolist() == [[1.0, 2.0], [18.0, 0.0]]
    assert parts.spread(torch.tensor([[5.0, 6.0], [7.0, 0.0]])).tolist() == [5.0, 5.0, 6.0, 7.0, 7.0, 7.0, 7.0]


def test_selected_groups_bring_their_tokens_in_the_given_order():
    chosen = with_tokens().select([1, 0, 1])
    assert chosen.tokens.logp.tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]
    assert chosen.tokens.given["number"].tolist() == chosen.tokens.logp.tolist()
    assert chosen.tokens.group.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert chosen.summed(chosen.tokens.logp).tolist() == chosen.logp.tolist()


def test_groups_without_tokens_cannot_be_given_any():
    with pytest.raises(ValueError, match="without their tokens"):
        layout([group(1)], [[1]]).with_tokens(torch.zeros(1))


def test_known_tokens_are_counted():
    parts = layout([group(1), group(1)], [[2], [1]], {"value": torch.tensor([1.0, float("nan"), 0.0])})
    assert parts.count("value").tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="'other'"):
        parts.known("other")


def test_completions_of_no_share_are_no_examples():
    assert preferred(group(2)).completions == group(1).completions
    assert preferred(group(3, targets=(0.0, 0.5, 0.5), rewards=(1.0, 2.0, 3.0))).rewards == (2.0, 3.0)
    whole = group(2, targets=(0.5, 0.5))
    assert preferred(whole) is whole


def test_without_targets_the_highest_known_reward_is_preferred_and_equals_share_that():
    cases = {
        (0.1, 0.9, 0.9): [0, 0.5, 0.5],
        (0.9, 0.1, 0.9): [0.5, 0, 0.5],
        (2.0, 2.0, None): [0.5, 0.5, 0],
        (None, -1.0, None): [0, 1, 0],
        (None, None, None): [1, 0, 0],
        (2.0, 1.0, None): [1, 0, 0],
    }
    for rewards, expected in cases.items():
        assert layout([group(3, rewards=rewards)], [[1, 1, 1]]).targets.tolist() == [expected]
    # targets go first
    assert shares(group(2, rewards=(0.0, 1.0), targets=(1.0, 0.0))) == [1.0, 0.0]
    assert preferred(group(2, rewards=(0.0, 1.0))).rewards == (1.0,)


def test_a_tie_of_rewards_pulls_a_policy_to_neither_side():
    """The gradient of -log s(z) / 2 - log s(-z) / 2 at z = 0 is 0; of a preference for the first answer it would be -1/2."""
    parts = layout([group(2, rewards=(0.7, 0.7)), group(2, rewards=(0.7, 0.6))], [[1, 1]] * 2)
    logp = torch.zeros(2, 2, requires_grad=True)
    DPO(beta=1.0)(parts.with_logp(logp), parts).sum().backward()
    assert logp.grad.tolist() == [[0.0, 0.0], [-0.5, 0.5]]


def test_the_preferred_completion_is_on_one_side_and_all_others_on_the_other():
    assert sides(group(2, targets=(0.3, 0.7))) == [-1.0, 1.0]
    assert sides(group(3, targets=(0.4, 0.35, 0.25))) == [1.0, -1.0, -1.0]
    assert sides(group(3, targets=(0.4, 0.2, 0.4))) == [None, -1.0, None]  # nobody says which of two, but the third is neither
    assert sides(group(2, targets=(0.5, 0.5))) == [None, None]
    assert sides(group(1)) == [1.0]


def test_the_one_and_zero_of_a_plain_preference_or_label_are_no_scores():
    assert unscored(group(2, rewards=(0.0, 1.0)))
    assert unscored(group(1, rewards=(0.0,), provenance={"label": False}))
    assert not unscored(group(1, rewards=(0.0,)))  # by a reward that punishes
    assert not unscored(group(2, rewards=(0.0, 0.0)))
    assert not unscored(group(2, rewards=(1.0, 0.0), targets=(1.0, 0.0)))  # grades beside a preference
    assert not unscored(group(2, rewards=(0.0, 1.0), provenance={"scored": True}))
    assert not unscored(group(2))


def test_an_only_answer_that_is_labelled_false_is_no_example():
    assert examples(group(1, rewards=(0.0,), provenance={"label": False})).completions == ()
    assert len(examples(group(1, rewards=(1.0,), provenance={"label": True})).completions) == 1
    assert len(examples(group(1, rewards=(0.0,))).completions) == 1  # by a reward that punishes, the best there is
    assert len(examples(group(1)).completions) == 1
    assert layout([examples(group(2, rewards=(0.0, 0.0)))], [[1, 1]]).targets.tolist() == [[0.5, 0.5]]  # as good as one another
