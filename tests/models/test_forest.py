"""Tries and masks, checked against definitions written out by hand."""

import random

import pytest
import torch

from fiducial.core.errors import DataError
from fiducial.models.forest import Paths, Row, additive, common, visible
from fiducial.models.planning import plan, stats


def some_paths(seed: int) -> Paths:
    """Random tries: duplicates, prefixes of one another, one-token continuations, paths that share nothing, unscored paths."""
    draw = random.Random(seed)
    pairs, group = [], []
    for number in range(draw.randint(1, 5)):
        prompt = [draw.randrange(3) for _ in range(draw.randint(1, 6))]
        for _ in range(draw.randint(1, 8)):
            ids = prompt + [draw.randrange(2) for _ in range(draw.choice([0, 1, 1, 2, 5]))]
            pairs.append((ids, draw.choice([len(prompt), len(prompt), len(ids), 1])))
            group.append(number)
    return Paths.of(pairs, group=group)


def read_back(row: Row, node: int) -> list[int]:
    """Tokens from the root down to a node."""
    tokens = []
    while node != -1:
        tokens.append(int(row.ids[node]))
        node = int(row.parent[node])
    return tokens[::-1]


def ancestors(row: Row) -> torch.Tensor:
    """Ancestor-or-self matrix by walking the parents."""
    matrix = torch.zeros(len(row.ids), len(row.ids), dtype=torch.bool)
    for node in range(len(row.ids)):
        above = node
        while above != -1:
            matrix[node, above] = True
            above = int(row.parent[above])
    return matrix


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("backend", ["tree", "split", "kv", "padded", "auto"])
def test_every_plan_holds_every_path_once_and_its_mask_is_the_ancestor_matrix(seed, backend):
    paths = some_paths(seed)
    rows = plan(paths, budget=random.Random(seed).choice([1, 10, 40, 800]), backend=backend, keep_last=seed % 2 == 0)
    assert sorted(index for row in rows for index in row.paths) == list(range(len(paths)))
    for row in rows:
        assert torch.equal(visible(row), ancestors(row))
        for edge in range(len(row.edge_target)):
            index, step = row.paths[row.edge_path[edge]], int(row.edge_step[edge])
            at = paths.start[index] + step
            assert read_back(row, int(row.edge_parent[edge])) == list(paths.ids[index][:at])
            assert int(row.edge_target[edge]) == paths.ids[index][at]
            if row.edge_node[edge] >= 0:
                assert read_back(row, int(row.edge_node[edge])) == list(paths.ids[index][: at + 1])
        assert torch.equal(row.unique_parents[row.edge_u], row.edge_parent)
        for local, index in enumerate(row.paths):
            assert read_back(row, int(row.prompt_end[local])) == list(paths.ids[index][: paths.start[index]])
            if row.leaves[local] >= 0:
                assert read_back(row, int(row.leaves[local])) == list(paths.ids[index])
    assert stats(paths, rows).scored == sum(len(ids) - start for ids, start in zip(paths.ids, paths.start, strict=True))


def test_a_small_tree_looks_as_drawn():
    # 1 - 2 - 3 - 5 (6)      the tokens in brackets are only targets
    #       \ 4 (7)
    row = plan(Paths([[1, 2, 3, 5, 6], [1, 2, 4, 7]], [2, 2], [0, 0]))[0]
    assert row.ids.tolist() == [1, 2, 3, 5, 4]
    assert row.pos.tolist() == [0, 1, 2, 3, 2]
    assert row.parent.tolist() == [-1, 0, 1, 2, 1]
    assert row.end.tolist() == [5, 5, 4, 4, 5]
    assert row.edge_parent.tolist() == [1, 2, 3, 1, 4]
    assert row.edge_target.tolist() == [3, 5, 6, 4, 7]
    assert row.unique_parents.tolist() == [1, 2, 3, 4]  # two first tokens share one head row
    assert row.edge_u.tolist() == [0, 1, 2, 0, 3]
    assert row.edge_node.tolist() == [2, 3, -1, 4, -1]
    assert row.leaves.tolist() == [-1, -1]


def test_one_token_choices_cost_no_node():
    rows = plan(Paths([[1, 2, 3, answer] for answer in range(4)], [3] * 4, [0] * 4))
    assert [len(row.ids) for row in rows] == [3]


def test_last_tokens_become_nodes_when_kept():
    row = plan(Paths([[1, 2, 3], [1, 2, 4]], [2, 2], [0, 0]), keep_last=True)[0]
    assert row.ids.tolist() == [1, 2, 3, 4]
    assert row.leaves.tolist() == [2, 3]


def test_window_and_block_are_measured_along_the_path():
    # the second branch starts at row index 4, but at position 2
    row = plan(Paths([[1, 2, 3, 4, 9], [1, 2, 5, 9]], [1, 1], [0, 0]))[0]
    assert row.pos.tolist() == [0, 1, 2, 3, 2]
    assert visible(row, window=2)[4].tolist() == [False, True, False, False, True]
    assert visible(row, block=2)[4].tolist() == [False, False, False, False, True]


def test_additive_mask_is_zero_or_the_lowest_number():
    mask = additive(torch.tensor([[True, False]]), torch.bfloat16)
    assert mask.tolist() == [[0.0, torch.finfo(torch.bfloat16).min]]


def test_no_row_of_a_mask_is_empty():
    for row in plan(some_paths(3), budget=12):
        assert visible(row).diagonal().all()


@pytest.mark.parametrize(
    ("ids", "start", "group", "says"),
    [
        ([[1, 2]], [0], [0], "no context"),
        ([[1, 2]], [3], [0], "from token 3 of 2"),
        ([[]], [1], [0], "no tokens"),
        ([[1, 2]], [1, 1], [0], "do not fit together"),
    ],
)
def test_bad_paths_are_refused(ids, start, group, says):
    with pytest.raises(DataError, match=says):
        Paths(ids, start, group)


def test_selecting_paths_keeps_groups():
    assert Paths([[1, 2], [3, 4], [5, 6]], [1, 1, 1], [7, 8, 7]).select([2, 0]) == Paths([[5, 6], [1, 2]], [1, 1], [7, 7])


def test_common_beginning():
    assert [common((1, 2, 3), (1, 2, 4)), common((1,), (1, 2)), common((), (1,)), common((2,), (1,))] == [2, 1, 0, 0]
