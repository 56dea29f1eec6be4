"""Which paths share a row, by what it costs."""

import pytest

from fiducial.core.errors import DataError
from fiducial.models.forest import Paths
from fiducial.models.planning import plan, stats


def test_a_beginning_shared_by_all_groups_counts_once_in_a_row():
    system = list(range(20))
    paths = Paths([[*system, 50 + group, 60 + choice, 70] for group in range(4) for choice in range(2)], [21] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    rows = plan(paths)
    assert len(rows) == 1
    assert len(rows[0].ids) == 20 + 4 * (1 + 2)


def test_the_same_prompt_is_shared_even_when_no_group_says_so():
    rows = plan(Paths([[*range(30), 40 + choice, 50] for choice in range(4)], [30] * 4), backend="auto")
    assert [(row.form, len(row.ids)) for row in rows] == [("tree", 34)]


def test_a_group_is_divided_only_when_its_tree_exceeds_the_budget():
    paths = Paths([[1, 2, *([10 + path] * 9)] for path in range(6)], [2] * 6, [0, 0, 1, 1, 2, 2])
    for row in plan(paths, budget=18):
        groups = [paths.group[index] for index in row.paths]
        assert all(groups.count(group) == 2 for group in groups)


def test_a_large_tree_is_cut_by_the_cost_of_repeating_its_prefix():
    # prefix 100, 8 answers of 400: S / sqrt(P (c + P)) = 3200 / sqrt(100 * 1600) = 8 rows at c = 1500, but 3200 / (800 - 100) < 5 fill the budget:
    # rows of about 740 nodes, which two answers come closest to
    short = Paths([[7] * 100 + [10 + path] * 401 for path in range(8)], [100] * 8, [0] * 8)
    assert [len(row.paths) for row in plan(short, budget=800)] == [2, 2, 2, 2]
    # prefix 4000, rest 1000: 1000 / sqrt(4000 * 5500) = 0.2, so the row stays whole although it exceeds the budget
    long = Paths([[7] * 4000 + [10 + path] * 126 for path in range(8)], [4000] * 8, [0] * 8)
    assert [len(row.ids) for row in plan(long, budget=800)] == [5000]


def test_nothing_shared_is_planned_side_by_side():
    paths = Paths([[path] * 50 for path in range(1, 9)], [10] * 8)
    assert {row.form for row in plan(paths, backend="auto")} == {"padded"}


def test_statistics_of_two_answers_to_one_prompt():
    # prompt 4, answers 3 and 1: the last token is not fed, so 6 and 4 naive, 2 * 6 padded, 4 + 2 unique, 4 scored
    paths = Paths([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8]], [4, 4], [0, 0])
    found = stats(paths, plan(paths))
    assert (found.naive, found.padded, found.unique, found.scored) == (10, 12, 6, 4)


def test_unknown_plans_and_budgets_are_refused():
    with pytest.raises(DataError, match="no plan 'forest'"):
        plan(Paths([[1, 2]], [1]), backend="forest")
    with pytest.raises(DataError, match="holds nothing"):
        plan(Paths([[1, 2]], [1]), budget=0)
