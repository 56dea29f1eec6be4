"""Attention cut into blocks against the whole mask."""

import random

import pytest
import torch

from fiducial.models import blocks as blocks_module
from fiducial.models.attention import _attend
from fiducial.models.blocks import blocks_of, cut
from fiducial.models.forest import Paths, additive, plan, visible


class Attention:
    is_causal = True


def row_of(draw, *, trees, most):
    ids, group = [], []
    for tree in range(trees):
        prompt = [draw.randrange(3) for _ in range(draw.randint(1, most))]
        for _ in range(draw.randint(1, 5)):
            ids.append(([tree, *prompt, *(draw.randrange(3) for _ in range(draw.randint(1, most)))], 1))
            group.append(tree)
    (row,) = plan(Paths.of(ids, group=group), budget=10_000, backend="tree", dense=False)
    return row


def drawn(size, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, size, heads, 4, generator=draw, dtype=torch.float64).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]


def both(row, fixed_cost, monkeypatch):
    """The mask whole, and cut with that fixed cost of a block."""
    monkeypatch.setattr(blocks_module, "BLOCK", fixed_cost)
    mask = additive(visible(row), torch.float64)[None, None]
    return mask, cut(mask.clone(), row)


@pytest.mark.parametrize("seed", range(12))
def test_blocks_attend_as_the_whole_mask_does(seed, monkeypatch):
    draw = random.Random(seed)
    row = row_of(draw, trees=draw.randint(1, 4), most=12)
    whole, blocked = both(row, draw.choice([0, 5, 50]), monkeypatch)
    inputs = drawn(len(row.ids), seed)
    results = [_attend(Attention(), *inputs, mask)[0] for mask in (whole, blocked)]
    assert torch.allclose(*results)
    pull = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(result, inputs, pull) for result in results), strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("fixed_cost", [0, 1000])
def test_gradients_of_attention_pass_gradcheck(fixed_cost, monkeypatch):
    row = row_of(random.Random(3), trees=2, most=4)
    _, mask = both(row, fixed_cost, monkeypatch)
    assert torch.autograd.gradcheck(lambda *qkv: _attend(Attention(), *qkv, mask)[0], drawn(len(row.ids), 0))


@pytest.mark.parametrize("seed", range(5))
def test_every_pair_that_sees_each_other_is_in_one_block(seed, monkeypatch):
    row = row_of(random.Random(seed), trees=3, most=9)
    _, mask = both(row, 5, monkeypatch)
    seen = torch.zeros(len(row.ids), len(row.ids), dtype=torch.long)
    for block in blocks_of(mask):
        for a, b in block.keys:
            seen[block.first : block.last, a:b] += 1
    assert bool((seen[visible(row)] == 1).all())
    assert int(seen.max()) == 1
    assert int(seen.sum()) < len(row.ids) ** 2


def test_a_row_not_worth_cutting_stays_whole(monkeypatch):
    row = row_of(random.Random(0), trees=1, most=4)
    assert blocks_of(both(row, 10_000, monkeypatch)[1]) is None


def test_a_row_of_very_many_branches_stays_whole(monkeypatch):
    monkeypatch.setattr(blocks_module, "MOST_RUNS", 3)
    assert blocks_of(both(row_of(random.Random(0), trees=4, most=6), 0, monkeypatch)[1]) is None


def test_a_mask_that_was_worked_on_carries_no_blocks(monkeypatch):
    _, mask = both(row_of(random.Random(0), trees=4, most=6), 0, monkeypatch)
    assert blocks_of(mask) is not None
    assert blocks_of(mask + 0) is None


def test_trees_side_by_side_cost_no_more_than_apart():
    """What attention leaves out need not keep trees out of a row."""
    paths = Paths.of([([tree] + [1] * 300 + [branch] * 20, 301) for tree in range(4) for branch in (2, 3)], group=[0, 0, 1, 1, 2, 2, 3, 3])
    sizes = {dense: [len(row.ids) for row in plan(paths, budget=800, crossover=300.0, dense=dense)] for dense in (True, False)}
    assert len(sizes[False]) < len(sizes[True])
    assert sum(sizes[False]) == sum(sizes[True])
