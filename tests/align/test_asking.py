import pytest

from fiducial.align.asking import ask, distinct, helper, texts, transcript
from fiducial.core.errors import ModelError
from fiducial.core.records import Completion, Message, user
from fiducial.data.languages import tongue
from fiducial.models.scripted import ScriptedModel


def test_a_helper_without_a_name_is_the_model_itself_and_stays_open():
    closed = []
    model = ScriptedModel(default="hi")
    model.close = lambda: closed.append(1)
    with helper("", model) as found:
        assert found is model
    assert closed == []


def test_a_helper_is_opened_by_name_and_a_wrong_name_is_an_error(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("default: other\n", encoding="utf-8")
    with helper(f"scripted:{path}", ScriptedModel(default="own")) as found:
        assert texts(found, [user("a")], max_tokens=8) == ["other"]
    with pytest.raises(ModelError), helper("/no/such/folder", ScriptedModel()):
        pass


def test_answers_lose_surrounding_space_and_a_failed_one_has_no_text():
    model = ScriptedModel({"good": " yes \n", "bad": Completion(text="half", finish="error", error="gone"), "cut": Completion(text="ab ", finish="length")})
    rows = ask(model, [user("good"), user("bad"), user("cut")], max_tokens=8)
    assert [(row[0].text, row[0].finish) for row in rows] == [("yes", "stop"), ("", "error"), ("ab", "length")]
    assert ask(model, [], max_tokens=8) == []


def test_equal_empty_and_blocked_answers_are_no_candidates():
    answers = [Completion(text="a"), Completion(text=""), Completion(text="b"), Completion(text="a"), Completion(text="c", finish="filtered")]
    assert [c.text for c in distinct(answers)] == ["a", "b"]


def test_a_transcript_names_who_speaks_in_the_language_of_the_prompt():
    talk = (Message(role="system", content="Be kind."), *user("Hi"), Message(role="assistant", content="Hello"))
    assert transcript(talk, "en") == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello"
    assert transcript(user("你好"), "zh-tw") == "用户: 你好"
    assert tongue("fr") == "en"
