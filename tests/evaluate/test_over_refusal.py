import pytest

from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Score
from fiducial.evaluate.over_refusal import OverRefusal
from fiducial.models.scripted import ScriptedModel

ANSWERS = {"lock": "I am sorry.", "tea": "Boil water.", "bus": "hm", "owl": Completion(text="", finish="error", error="busy"), "pie": "Bake it."}


@pytest.fixture
def model():
    return ScriptedModel(ANSWERS, default="sorry")


@pytest.fixture
def data(rows):
    return rows(*({"prompt": f"Tell me about the {word}.", "category": word} for word in ANSWERS))


def test_the_rate_counts_refusals_among_what_could_be_judged(model, data, sorry):
    (score,) = OverRefusal(judge=sorry, data=data).run(model).scores
    # lock is refused, tea and pie are answered, bus is unclear, owl failed
    assert (score.metric, score.better, score.n, score.not_scored) == ("refusal_rate", "lower", 3, 2)
    assert (score.value, score.items) == (pytest.approx(1 / 3), (1.0, 0.0, 0.0))
    assert Score.parse(score.line()) == score


def test_items_say_why_they_were_not_scored(model, data, sorry):
    seen = []
    items = OverRefusal(judge=sorry, data=data).run(model, sink=seen.append).items
    assert [i["refused"] for i in items] == [True, False, None, None, False]
    assert [i["reason"] for i in items] == ["", "", "no idea", "busy", ""]
    assert seen == items


def test_figures_over_different_answers_have_different_item_marks(model, data, sorry):
    suite = OverRefusal(judge=sorry, data=data)
    other = ScriptedModel(ANSWERS | {"bus": "Wait."})
    marks = [suite.run(m).scores[0].fingerprint for m in (model, other)]
    assert marks[0]["data"] == marks[1]["data"]
    assert marks[0]["items"] != marks[1]["items"]


def test_splits_divide_the_prompts(model, rows, sorry):
    data = rows(*({"prompt": f"Tea number {n}", "twin": f"Goal {n}"} for n in range(40)))
    parts = [{i["prompt"] for i in OverRefusal(judge=sorry, data=data, split=s).run(model).items} for s in ("repair", "validation", "held-out")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40
    assert all(parts)


def test_the_limit_takes_the_first(model, data, sorry):
    assert [i["category"] for i in OverRefusal(judge=sorry, data=data).run(model, limit=2).items] == ["lock", "tea"]
    (score,) = OverRefusal(judge=sorry, data=data).run(model, limit=0).scores
    assert (score.n, score.low, score.high) == (0, 0.0, 1.0)


def test_an_unknown_split_is_an_error(sorry):
    with pytest.raises(ConfigError, match="held-out"):
        OverRefusal(judge=sorry, split="heldout")
