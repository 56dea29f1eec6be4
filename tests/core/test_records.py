import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fiducial.core.intervals import Rate
from fiducial.core.records import Attempt, Completion, Event, Group, Message, Prompt, Score, Verdict, Weakness, digest, user

texts = st.text(st.characters(exclude_categories=["Cs"]))


def attempt(**changes):
    return Attempt(**{"prompt": Prompt(messages=user("hi")), "attack": "attack/persona", "family": "persona", "model": "abc"} | changes)


def test_the_digest_is_sha_256_of_canonical_json():
    assert digest({"b": 1, "a": "é"}) == hashlib.sha256('{"a":"é","b":1}'.encode()).hexdigest()[:16]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


def test_two_equal_records_have_one_id_and_a_change_gives_another():
    assert Message(role="user", content="a").id == Message(role="user", content="a").id
    assert Message(role="user", content="a").id != Message(role="user", content="b").id


def test_an_attempt_is_identified_by_what_was_tried_not_by_what_came_back():
    assert attempt(response="one", completion_tokens=3).id == attempt(response="two").id
    assert attempt(seed=1).id != attempt(seed=2).id
    assert attempt(parameters={"steps": 1}).id != attempt(parameters={"steps": 2}).id


def test_records_cannot_be_changed_and_refuse_unknown_fields():
    message = Message(role="user", content="a")
    with pytest.raises(ValidationError, match="frozen"):
        message.content = "b"
    with pytest.raises(ValidationError, match="Extra inputs"):
        Message(role="user", content="a", colour="red")
    with pytest.raises(ValidationError, match="role"):
        Message(role="robot", content="a")


def test_a_line_begins_with_the_version_and_leaves_defaults_out():
    assert Message(role="user", content="二").line() == '{"v": 1, "role": "user", "content": "二"}'
    assert Prompt(messages=user("a")).line() == '{"v": 1, "messages": [{"role": "user", "content": "a"}]}'


def test_a_line_of_another_schema_is_refused():
    with pytest.raises(ValueError, match="schema 2; this program reads schema 1"):
        Message.parse('{"v": 2, "role": "user", "content": "a"}')


@given(texts, texts, st.lists(st.floats(-1e6, 0)), st.sampled_from(["stop", "length", "filtered", "error"]))
def test_what_is_written_is_read_back_equal(question, answer, logprobs, finish):
    group = Group(
        prompt=Prompt(messages=user(question), twin=answer), completions=(Completion(text=answer, logprobs=tuple(logprobs), finish=finish),), rewards=(None,)
    )
    assert Group.parse(group.line()) == group
    assert "\n" not in group.line()
    assert Group.parse(group.line()).id == group.id


def test_an_attempt_with_a_verdict_is_read_back_equal():
    record = attempt(verdict=Verdict(judge="oversee/refusal", outcome="not_scored", score=0.25), sent=user("x"), decoded="")
    assert Attempt.parse(record.line()) == record


def test_the_text_of_a_prompt_is_its_last_turn_of_the_user():
    turns = (*user("one"), Message(role="assistant", content="a"), *user("two"), Message(role="assistant", content="Sure,"))
    assert Prompt(messages=turns).text == "two"
    assert Prompt(messages=()).text == ""


def test_a_goal_and_its_twin_are_one_cluster():
    goal = Prompt(messages=user("kill him"), expected="refuse", twin="kill time")
    twin = Prompt(messages=user("kill time"), expected="comply", twin="kill him")
    assert goal.cluster == twin.cluster
    assert goal.cluster != Prompt(messages=user("kill him")).cluster


def test_a_group_has_one_reward_and_one_target_per_completion():
    two = (Completion(text="a"), Completion(text="b"))
    prompt = Prompt(messages=user("x"))
    with pytest.raises(ValidationError, match="2 completions but 1 rewards"):
        Group(prompt=prompt, completions=two, rewards=(1.0,))
    with pytest.raises(ValidationError, match=r"targets must sum to 1, got 1\.5"):
        Group(prompt=prompt, completions=two, targets=(1.0, 0.5))
    assert Group(prompt=prompt, completions=two, targets=(0.75, 0.25), rewards=(None, 1.0)).weight == 1.0


def test_a_score_of_a_rate_carries_its_wilson_interval():
    score = Score.of_rate(Rate(8, 10), suite="s", metric="accuracy")
    assert (score.value, score.n, score.interval) == (0.8, 10, "wilson")
    assert (score.low, score.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    nothing = Score.of_rate(Rate(0, 0), suite="s", metric="accuracy")
    assert (nothing.value, nothing.n, nothing.low, nothing.high) == (0.0, 0, 0.0, 1.0)
    assert Score.of_rate(Rate(0, 0), suite="s", metric="refusal_rate", better="lower").value == 1.0  # not perfect


def test_a_weakness_knows_its_rate():
    assert Weakness(slice={"family": "persona"}, hits=3, n=4).rate == Rate(3, 4)


def test_every_field_that_is_not_plain_has_a_description():
    # docstrings below fields become the schema's descriptions
    assert Event.model_json_schema()["properties"]["hash"]["description"].startswith("SHA-256")


def test_a_number_that_is_not_finite_is_null_on_disk_and_nan_when_read():
    completion = Completion(text="a", logprobs=(-0.5, float("-inf"), float("nan")))
    assert completion.line() == '{"v": 1, "text": "a", "logprobs": [-0.5, null, null]}'
    again = Completion.parse(completion.line())
    assert again.logprobs[0] == -0.5
    assert all(math.isnan(value) for value in again.logprobs[1:])
    assert again.id == completion.id
    assert again.line() == completion.line()
    group = Group(prompt=Prompt(messages=user("hi")), completions=(completion,), rewards=(None,))
    assert Group.parse(group.line()).rewards == (None,)
    assert attempt(parameters={"clip": float("inf")}).line().count("null") == 1


def test_a_null_where_no_number_belongs_is_refused():
    with pytest.raises(ValidationError, match="valid string"):
        Completion.parse('{"v": 1, "text": null, "logprobs": [null]}')


def test_parts_of_a_text_have_one_value_each_and_rising_ends():
    completion = Completion(text="a\nb\n", ends=(2, 4), values=(1.0, None))
    assert Completion.parse(completion.line()) == completion
    for ends, values in (((2,), ()), ((2, 2), (1.0, 1.0)), ((0, 2), (1.0, 1.0)), ((5,), (1.0,))):
        with pytest.raises(ValueError, match=r"parts but|ends must rise"):
            Completion(text="a\nb\n", ends=ends, values=values)
