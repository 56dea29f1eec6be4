import json

import pytest

from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion
from fiducial.evaluate.best_of_n import BestOfN, choices
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


def test_votes_are_counted_over_problems_and_failed_samples_are_not_scored(data):
    model = Solver({"2+2": texts("so 4", "it is 5", "4."), "3+3": texts("6", "7", "7"), "1+1": texts("", "", "", finish="error")})
    seen = []
    result = BestOfN(data=data, n=3).run(model, sink=seen.append)
    # 2 of 3 and 1 of 3 samples are right; the vote is 4, right, and 7, wrong; some sample is right in both
    assert figures(result) == {"single": (0.5, 2, 1), "majority": (0.5, 2, 1), "any_right": (1.0, 2, 1)}
    assert seen == result.items
    assert [i["solved"] is None for i in result.items] == [False, False, True]


def test_a_reward_model_chooses_and_weighs(data, monkeypatch):
    class Judge:
        def score(self, groups):
            return [tuple(0.1 if "no" in c.text else 0.9 for c in g.completions) for g in groups]

    asked = []
    monkeypatch.setattr(registry, "create", lambda name, options: asked.append((name, options)) or Judge())
    model = Solver({"2+2": texts("yes 4", "no 5", "no 5"), "3+3": texts("no 6", "yes 7", "no 6"), "1+1": texts("yes 2", "yes 3", "no 2")})
    found = figures(BestOfN(data=data, n=3, reward="run:R", steps="last").run(model))
    assert asked[0] == ("align/learned_reward", {"models": ("run:R",), "steps": "last"})
    assert found["majority"][0] == pytest.approx(2 / 3)  # 5, 6, 2
    assert found["best"][0] == pytest.approx((1 + 0 + 0.5) / 3)  # 4; 7; 2 and 3 tie
    assert found["weighted"][0] == pytest.approx((1 + 0 + 1) / 3)  # 4 with 0.9; 7 with 0.9 against 0.2; 2 with 1.0


def test_scores_below_zero_choose_and_do_not_weigh():
    assert choices(["4", "5"], [-1.0, -2.0], "4").keys() == {"single", "majority", "any_right", "best"}
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
