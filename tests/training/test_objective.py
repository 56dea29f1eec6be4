"""What an objective sees."""

import torch

from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout


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
