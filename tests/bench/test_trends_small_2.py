"""More trend scripts on a tiny random model: that they run and record, and that their programs of gold labels are right."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

TRENDS = Path(__file__).resolve().parents[2] / "bench" / "trends"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that the benchmarks import


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name as it is when run; nothing of it stays imported."""
    monkeypatch.syspath_prepend(str(TRENDS))
    before, path = torch.get_num_threads(), list(sys.path)
    yield importlib.import_module
    torch.set_num_threads(before)
    sys.path[:] = path
    for name in {"protocol", *(file.stem for file in TRENDS.glob("*.py"))} & set(sys.modules):
        del sys.modules[name]


def small(script, name, tmp_path):
    """The record of a script's small run."""
    assert script(name).main(["--small", "--seeds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}\n")
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_prm_against_orm_compares_every_way_of_choosing_at_every_n(script, tmp_path):
    found = small(script, "prm_against_orm", tmp_path)
    assert [row["N"] for row in found["rows"]] == [1, 2, 4]
    assert len(found["directions"]) == 3
    for seed in found["seeds"]:
        ones = {seed["solved"][way]["1"] for way in ("PRM", "ORM", "any right")}
        assert len(ones) == 1  # the best of one is any sample, whoever chooses
        assert seed["samples"]["samples"] == 8


def test_constitutional_sft_measures_harm_and_helpfulness_before_and_after(script, tmp_path):
    found = small(script, "constitutional_sft", tmp_path)
    first, second = found["seeds"]
    assert first["before"] == second["before"]
    assert set(first["after"]) == set(first["before"])
    assert len(found["directions"]) == 4


def test_a_solution_is_held_against_the_right_one_line_by_line(script):
    prm = script("prm_against_orm")
    problem = prm.Problem(12, (("+", 35), ("-", 18)))
    assert problem.prompt.text == "What is the last digit of 12+35-18?"
    assert problem.lines == ["12+35=47", "47-18=29", "answer 9"]

    def seen(*lines):
        found = prm.checked(problem, "\n".join(lines))
        return found.completion.values, found.answer, found.right, found.lucky

    assert seen("12+35=47", "47-18=29", "answer 9") == ((1.0, 1.0, 1.0), "answer 9", True, False)
    assert seen("12+35=57", "57-18=39", "answer 9") == ((0.0, None, None), "answer 9", True, True)
    assert seen("12+35=47", "47-18=28", "answer 8") == ((1.0, 0.0, None), "answer 8", False, False)
    assert seen("answer 9") == ((0.0,), "answer 9", True, True)
    assert seen("12+35=47") == ((1.0,), "", False, False)
    assert seen("") == ((), "", False, False)
    assert seen("12+35=47", "47-18=29", "answer 9", "answer 9") == ((1.0, 1.0, 1.0, 0.0), "answer 9", True, True)


def test_problems_stay_below_a_hundred(script):
    prm = script("prm_against_orm")
    rng = random.Random(0)
    for problem in (prm.Problem.draw(rng, 4) for _ in range(100)):
        results = [int(line.split("=")[1]) for line in problem.lines[:-1]]
        assert len(results) == 4
        assert all(0 <= r <= 99 for r in results)


def test_a_vote_is_won_by_the_largest_weight_and_ties_are_shared(script):
    prm = script("prm_against_orm")
    problem = prm.Problem(1, (("+", 11),))
    row = [prm.checked(problem, f"1+11=12\nanswer {d}") for d in (2, 3, 3)]

    def solved(*weights, n=3):
        return prm.voted(row, weights, n, random.Random(0))

    assert solved(1.0, 1.0, 1.0) == 0.0  # 3 has two votes
    assert solved(0.9, 0.1, 0.2) == 1.0
    assert solved(0.5, 0.25, 0.25) == 0.5
    # of the three pairs two hold the right answer and a wrong one, which tie
    assert solved(1.0, 1.0, 1.0, n=2) == pytest.approx(1 / 3, abs=0.1)
