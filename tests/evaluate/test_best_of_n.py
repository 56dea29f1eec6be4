import json

import pytest

from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion
from fiducial.core.roles import Reward
from fiducial.evaluate.best_of_n import BestOfN, _draws, choices
from fiducial.models.scripted import ScriptedModel, tiny


class Solver(ScriptedModel):
    """Three solutions to each problem."""

    def __init__(self, rows):
        super().__init__(default="")
        self.rows = rows

    def sample(self, conversations, *, k=1, **_):
        return [tuple(self.rows[c[-1].content][:k]) for c in conversations]


def texts(*found, finish="stop"):
    return [Completion(text=t, finish=finish) for t in found]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in (("2+2", 4), ("3+3", 6), ("1+1", 2))))
    return str(path)


def figures(result):
    return {s.metric: (s.value, s.n, s.not_scored) for s in result.scores}


def test_votes_are_counted_over_problems_and_a_problem_of_failed_samples_is_not_scored(data):
    model = Solver({"2+2": texts("so 4", "it is 5", "4."), "3+3": texts("6", "7", "7"), "1+1": texts("", "", "", finish="error")})
    seen = []
    result = BestOfN(data=data, n=3).run(model, sink=seen.append)
    # 2 of 3 and 1 of 3 samples are right; the vote is 4, right, and 7, wrong; some sample is right in both
    # of two: in 2+2 the vote is right in {4, 4} and half in the two pairs of 4 and 5; in 3+3 it is wrong in {7, 7} and half in the others
    found = figures(result)
    assert found.pop("failed") == (pytest.approx(1 / 3), 9, 0)
    assert found == {"single": (0.5, 2, 1), "any_right": (1.0, 2, 1), "majority": (0.5, 2, 1), "majority@2": (pytest.approx((2 / 3 + 1 / 3) / 2), 2, 1)}
    assert seen == result.items
    assert [i["solved"] is None for i in result.items] == [False, False, True]


def test_a_sample_that_failed_counts_as_a_wrong_one_and_is_counted(data):
    row = texts("4") + texts(*[""] * 7, finish="error")
    result = BestOfN(data=data, n=8).run(Solver({"2+2": row}), limit=1)
    found = figures(result)
    assert found["single"] == (1 / 8, 1, 0)
    assert found["failed"] == (7 / 8, 8, 0)
    # an empty answer has no vote, so that the vote is right wherever the right one was drawn: among two in 7 of 28 pairs
    assert (found["majority"][0], found["majority@2"][0], found["majority@4"][0]) == (1.0, 7 / 28, 0.5)
    assert result.items[0]["failed"] == 7


def test_the_best_of_fewer_is_the_mean_over_all_subsets_and_a_failed_sample_is_never_the_best():
    # pairs of the scores 3 (wrong), 2 (right), 1 (wrong), failed: the best is right in {2, 1} and {2, failed}
    found = choices(["5", "4", "5", ""], [3.0, 2.0, 1.0, -float("inf")], "4")
    assert found["best@2"] == pytest.approx(2 / 6)
    assert found["best"] == 0.0
    assert found["weighted"] == 0.0
    # the vote of 5 weighs 4 in all; in pairs 4 wins against the weaker 5 and against none
    assert found["weighted@2"] == pytest.approx(2 / 6)


def test_votes_of_many_are_averaged_over_as_many_draws_each_time():
    many = ["4", "5"] * 10
    assert len(_draws(20, 4)) == 400
    assert choices(many, [], "4") == choices(many, [], "4")
    assert choices(many, [], "4")["majority@8"] == pytest.approx(0.5, abs=0.06)  # by symmetry a half; 400 draws have a standard error of 0.02


def test_a_right_answer_with_a_step_that_the_process_model_calls_wrong_is_a_false_positive(data, monkeypatch):
    class Judge(Reward):
        def score(self, groups):
            return [tuple(0.9 for _ in g.completions) for g in groups]

        def doubts(self, groups):
            return [tuple("slip" in c.text for c in g.completions) for g in groups]

    monkeypatch.setattr(registry, "create", lambda name, options: Judge())
    model = Solver({"2+2": texts("slip 4", "slip 5"), "3+3": texts("6", "6"), "1+1": texts("3", "slip 3")})
    # of three right solutions one has a slip; what wrong ones have is no matter
    assert figures(BestOfN(data=data, n=2, reward="run:R").run(model))["false_positives"] == (pytest.approx(1 / 3), 3, 0)


def test_a_reward_model_chooses_and_weighs(data, monkeypatch):
    class Judge(Reward):
        def score(self, groups):
            return [tuple(0.1 if "no" in c.text else 0.9 for c in g.completions) for g in groups]

    asked = []
    monkeypatch.setattr(registry, "create", lambda name, options: asked.append((name, options)) or Judge())
    model = Solver({"2+2": texts("yes 4", "no 5", "no 5"), "3+3": texts("no 6", "yes 7", "no 6"), "1+1": texts("yes 2", "yes 3", "no 2")})
    found = figures(BestOfN(data=data, n=3, reward="run:R", steps="last").run(model))
    assert "false_positives" not in found  # a model that does not look at steps
    assert asked[0] == ("align/learned_reward", {"models": ("run:R",), "steps": "last"})
    assert found["majority"][0] == pytest.approx(2 / 3)  # 5, 6, 2
    assert found["best"][0] == pytest.approx((1 + 0 + 0.5) / 3)  # 4; 7; 2 and 3 tie
    assert found["weighted"][0] == pytest.approx((1 + 0 + 1) / 3)  # 4 with 0.9; 7 with 0.9 against 0.2; 2 with 1.0


def test_scores_below_zero_choose_and_do_not_weigh():
    assert choices(["4", "5"], [-1.0, -2.0], "4").keys() == {"single", "majority", "any_right", "best"}
    assert choices(["4", "5"], [1.0, 2.0], "4").keys() == {"single", "majority", "any_right", "best", "weighted"}
    assert "best" not in choices(["4", "5"], [0.5, None], "4")


def test_ties_share_their_places_and_what_says_nothing_has_no_vote():
    assert choices(["4", "5"], [], "4")["majority"] == 0.5
    assert choices(["", "4"], [], "4")["majority"] == 1.0
    assert choices(["", ""], [], "4")["majority"] == 0.0


def test_it_runs_on_a_model_and_needs_a_file(data):
    found = figures(BestOfN(data=data, n=2, max_tokens=4).run(tiny(), limit=2))
    assert found["single"][1] == 2
    with pytest.raises(ConfigError, match="final answers"):
        BestOfN().run(tiny())
    with pytest.raises(ConfigError, match="temperature"):
        registry.create("evaluate/best_of_n", {"temperature": 0})
