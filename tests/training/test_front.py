import torch
from torch import nn

from fiducial.training.front import Front, Point, best, front
from fiducial.training.weights import Trainables

A, B, C, D = Point(1, 1.0, 0.0), Point(2, 2.0, 0.5), Point(3, 1.5, 0.9), Point(4, 3.0, 2.0)


def test_the_front_is_what_nothing_beats_in_both():
    assert front([A, B, C, D]) == [A, B, D]
    assert front([A, A._replace(step=9)]) == [A]


def test_the_best_is_the_most_rewarded_within_the_limit_and_else_the_cheapest():
    assert best([A, B, C, D], limit=1.0) == B
    assert best([A, B, C, D], limit=5.0) == D
    assert best([B, C, D], limit=-1.0) == B


def test_a_checkpoint_is_worth_what_came_since_the_last_one_kept_or_not(tmp_path):
    """Ten steps each at (reward, cost) (5, 0), (0, 10), (6, -1): the last ten beat the first in both, however bad those between were."""
    module = nn.Linear(1, 1)
    kept = Front(tmp_path, Trainables(module), writes=True)
    worth = [(5.0, 0.0)] * 10 + [(0.0, 10.0)] * 10 + [(6.0, -1.0)] * 10
    history = [{"step": i + 1, "reward": reward, "cost": cost} for i, (reward, cost) in enumerate(worth)]
    for step in (10, 20, 30):
        with torch.no_grad():
            module.weight.fill_(step)
        kept.add(step, history[:step])
    assert kept.points == [Point(30, 6.0, -1.0)]
    assert kept.last == 30
    assert kept.take_best(limit=0.0) == Point(30, 6.0, -1.0)
    assert module.weight.item() == 30.0
