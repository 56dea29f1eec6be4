import json

import pytest

from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Message, user
from fiducial.models.scripted import ScriptedModel, tiny


def say(model, text, **options):
    return model.sample([user(text)], **options)[0][0]


def test_the_first_pattern_that_the_question_contains_answers():
    model = ScriptedModel({"hello": "hi", "hello there": "never"}, default="?")
    assert [say(model, text).text for text in ("hello there", "bye")] == ["hi", "?"]


def test_a_pattern_can_be_a_regular_expression():
    model = ScriptedModel({"re:^[0-9]+$": "a number"}, default="a text")
    assert [say(model, text).text for text in ("42", "x42")] == ["a number", "a text"]


def test_only_the_last_user_turn_is_looked_at():
    turns = (*user("hello"), Message(role="assistant", content="hello"), *user("bye"))
    assert ScriptedModel({"hello": "hi"}, default="?").sample([turns])[0][0].text == "?"


def test_several_answers_are_given_in_turn():
    (group,) = ScriptedModel({"x": ["a", "b"]}).sample([user("x")], k=3)
    assert [c.text for c in group] == ["a", "b", "a"]


def test_a_function_answers_for_the_whole_model_or_for_one_pattern():
    assert say(ScriptedModel(lambda turns: turns[-1].content.upper()), "abc").text == "ABC"
    assert say(ScriptedModel({"a": lambda turns: Completion(text="", finish="filtered")}), "abc").finish == "filtered"


def test_errors_and_lengths_can_be_played():
    model = ScriptedModel({"fail": Completion(text="", finish="error", error="down")}, default="one two three four")
    assert say(model, "fail").error == "down"
    short = say(model, "x", max_tokens=2)
    assert (short.text, short.finish, short.completion_tokens) == ("one two", "length", 2)


def test_the_answer_ends_before_a_stop_text():
    assert say(ScriptedModel(default="one. two"), "x", stop=["."]).text == "one"


def test_what_was_asked_is_counted_and_kept():
    model = ScriptedModel()
    model.sample([user("a"), user("b")], k=3)
    assert (model.calls, model.samples, model.asked) == (2, 6, [user("a"), user("b")])


def test_every_conversation_arrives():
    arrived = []
    groups = ScriptedModel(default="x").sample([user("a"), user("b")], arrived=lambda i, c: arrived.append((i, c)))
    assert arrived == list(enumerate(groups))


def test_the_fingerprint_is_that_of_the_script():
    assert ScriptedModel({"a": "b"}).fingerprint == ScriptedModel({"a": "b"}).fingerprint != ScriptedModel({"a": "c"}).fingerprint


def test_a_yaml_mapping_is_a_script(tmp_path):
    (tmp_path / "s.yaml").write_text("hello: hi\n're:[0-9]': [one, two]\ndefault: '?'\n")
    model = ScriptedModel.read(tmp_path / "s.yaml")
    assert [say(model, text).text for text in ("hello", "7", "x")] == ["hi", "one", "?"]


@pytest.mark.parametrize("name", ["s.yaml", "s.jsonl"])
def test_entries_of_a_file_can_say_how_an_answer_ends(tmp_path, name):
    entries = [{"when": "cut", "answer": "a b", "finish": "length"}, {"when": "down", "error": "no server"}]
    text = json.dumps(entries) if name == "s.yaml" else "\n".join(map(json.dumps, entries))
    (tmp_path / name).write_text(text)
    model = ScriptedModel.read(tmp_path / name)
    assert say(model, "cut").finish == "length"
    assert (say(model, "down").finish, say(model, "down").error) == ("error", "no server")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("s.jsonl", '{"when": "a", "answer": "b"}\n{"wen": "a"}', r"s\.jsonl:2"),
        ("s.jsonl", "{", "is no script"),
        ("s.yaml", "- {when: a, answer: 3}", "entry 1: 'answer'"),
        ("s.yaml", "- {when: a, answer: b, finish: maybe}", "maybe"),
        ("s.yaml", "just text", "is no script"),
        ("s.yaml", "- when: a\n  answer: [b\n", "s.yaml:3:1: not valid YAML"),
        ("s.yaml", "'re:(': b", "no regular expression"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=complaint):
        ScriptedModel.read(tmp_path / name)


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        ScriptedModel.read(tmp_path / "none.yaml")


def test_the_tiny_model_is_the_same_for_the_same_seed():
    assert tiny(seed=3).sample([user("x")], max_tokens=4) == tiny(seed=3).sample([user("x")], max_tokens=4)


def test_the_tiny_tokenizer_gives_back_every_text():
    tokenizer = tiny().tokenizer
    for text in ("he said: hé 日本\n\t x", " he he", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
