import json

import pytest

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion
from fiducial.evaluate.found_weaknesses import FoundWeaknesses, cases
from fiducial.models.scripted import ScriptedModel


def row(a, half="training", score=1.0, **fields):
    named = {"task": "arithmetic", "point": "sums", "half": half, "request": f"What is {a} + 1?", "check": {"kind": "sum", "value": f"{a} + 1"}}
    return named | {"response": "0", "score": score} | fields


def file(tmp_path, *rows):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def knows(*numbers):
    return ScriptedModel({f"What is {n} + 1?": str(n + 1) for n in numbers}, default="0")


ROWS = [row(1), row(2), row(3, "held-out"), row(4, "held-out"), row(5, score=10.0), row(6, "held-out", score=10.0)]


def test_what_was_mended_what_carried_over_and_what_was_kept_are_told_apart(tmp_path):
    result = FoundWeaknesses(data=file(tmp_path, *ROWS)).run(knows(1, 2, 3, 5))
    assert {s.metric: (s.value, s.n) for s in result.scores} == {"repaired": (1.0, 2), "carried_over": (0.5, 2), "kept": (0.5, 2)}
    assert [i["passed"] for i in result.items] == [True, True, True, False, True, False]
    assert result.scores[1].items == (1.0, 0.0)


def test_a_case_that_got_no_answer_is_not_scored(tmp_path):
    model = ScriptedModel({"What is 1": Completion(text="", finish="error", error="down")}, default="3")
    (score,) = FoundWeaknesses(data=file(tmp_path, row(1), row(2))).run(model).scores
    assert (score.value, score.n, score.not_scored) == (1.0, 1, 1)


def test_cases_that_a_model_assessed_or_that_have_no_mark_are_left_out(tmp_path):
    path = file(tmp_path, row(1, check=None), row(2, score=None), row(3))
    assert [c.prompt.text for c in cases(path)] == ["What is 3 + 1?"]
    with pytest.raises(DataError, match="none of the cases has a check"):
        cases(file(tmp_path, row(1, check=None)))


def test_a_file_that_holds_no_cases_is_named(tmp_path):
    with pytest.raises(DataError, match=r"results\.jsonl:1: a case needs request, half and score"):
        cases(file(tmp_path, {"prompt": "Q"}))
    with pytest.raises(DataError, match=r"results\.jsonl:1: check: kind"):
        cases(file(tmp_path, row(1, check={"kind": "rhyme"})))
    with pytest.raises(ConfigError, match="needs the cases that were found"):
        FoundWeaknesses().run(ScriptedModel())


def test_a_limit_takes_the_first_cases(tmp_path):
    assert len(FoundWeaknesses(data=file(tmp_path, *ROWS)).run(knows(), limit=2).items) == 2


def test_it_is_said_how_many_cases_are_left_out(tmp_path, caplog):
    cases(file(tmp_path, row(1, check=None), row(2, score=None), row(3)))
    assert "2 of 3 cases" in caplog.text
