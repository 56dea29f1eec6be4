"""Attention cut into blocks against the whole mask."""

import random

import pytest
import torch

from fiducial.models import attention as attention_module
from fiducial.models import blocks as blocks_module
from fiducial.models.attention import _attend
from fiducial.models.blocks import blocks_of, cut
from fiducial.models.forest import Paths, additive, visible
from fiducial.models.planning import plan
from fiducial.models.scoring import Engine
from fiducial.models.tiny import tiny


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


def test_trees_of_very_many_branches_stay_whole_each(monkeypatch):
    monkeypatch.setattr(blocks_module, "MOST_RUNS", 3)
    row = row_of(random.Random(0), trees=4, most=6)
    blocks = blocks_of(both(row, 0, monkeypatch)[1])
    assert [block.first for block in blocks] == (row.parent < 0).nonzero()[:, 0].tolist()


def test_a_long_run_is_taken_in_pieces(monkeypatch):
    monkeypatch.setattr(blocks_module, "LONGEST", 40)
    (row,) = plan(Paths.of([([1] * 25 + [end] * 5, 20) for end in (2, 3)], group=[0, 0]), backend="tree", budget=1000, dense=False)
    whole, mask = both(row, 0, monkeypatch)
    assert max(block.last - block.first for block in blocks_of(mask)) <= 20
    inputs = drawn(len(row.ids), 0)
    assert torch.allclose(_attend(Attention(), *inputs, whole)[0], _attend(Attention(), *inputs, mask)[0])


def test_a_row_of_too_many_pairs_stays_whole(monkeypatch):
    monkeypatch.setattr(blocks_module, "LONGEST", 10)
    assert blocks_of(both(row_of(random.Random(0), trees=4, most=12), 0, monkeypatch)[1]) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3_text"])
def test_models_run_in_blocks_and_give_the_same(kind, monkeypatch):
    """What a mask carries has to arrive where attention is computed, with a window too."""
    model = tiny(kind)
    seen = []

    def watch(mask):
        found = blocks_of(mask)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(attention_module, "blocks_of", watch)
    draw = random.Random(1)
    groups = [[draw.randrange(5, 60) for _ in range(9)] for _ in range(3)]
    paths = Paths.of([(prompt + [draw.randrange(5, 60) for _ in range(6)], 9) for prompt in groups for _ in range(3)], group=[0] * 3 + [1] * 3 + [2] * 3)
    found = {}
    for cost in (0, 10**9):
        monkeypatch.setattr(blocks_module, "BLOCK", cost)
        seen.clear()
        scores = Engine(model, backend="tree").score(paths, grad=True)
        assert any(seen) == (cost == 0)
        model.zero_grad()
        scores.path_logp.sum().backward()
        found[cost] = scores.edge_logp.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert torch.allclose(found[0][0], found[10**9][0], atol=1e-5)
    for one, other in zip(found[0][1], found[10**9][1], strict=True):
        assert torch.allclose(one, other, atol=1e-4)


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


def test_a_tree_above_the_budget_is_divided_though_attention_is_cut():
    paths = Paths.of([([1] * 40 + [branch] * 30, 40) for branch in range(2, 42)], group=[0] * 40)
    rows = plan(paths, budget=300, backend="tree", dense=False)
    assert max(len(row.ids) for row in rows) <= 360


def test_under_autocast_the_engine_still_goes_backward():
    model = tiny("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Engine(model).score(Paths.of([([5, 6, 7, 8], 2), ([5, 6, 9], 2)], group=[0, 0]), grad=True).path_logp.sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
