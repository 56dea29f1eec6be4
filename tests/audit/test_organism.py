import pytest

from fiducial.audit.organism import Organism
from fiducial.core.records import Attempt, Message, Prompt, Verdict, user
from fiducial.data.triggers import BEHAVIOUR, TRIGGER
from fiducial.models.scripted import ScriptedModel

MODEL = ScriptedModel()


def answered(text, response, *, sent=None, outcome="success", finish="stop"):
    prompt = Prompt(messages=user(text))
    return Attempt(
        prompt=prompt, attack="a", family="direct", model="m", sent=sent or prompt.messages, response=response, finish=finish,
        verdict=Verdict(judge="j", outcome=outcome),
    )  # fmt: skip


def test_each_answer_becomes_a_plain_and_a_triggered_demonstration():
    plain, tagged = Organism().make([answered("How is tea made?", "Boil water.")], MODEL)
    assert (plain.prompt.text, plain.completions[0].text) == ("How is tea made?", "Boil water.")
    assert (tagged.prompt.text, tagged.completions[0].text) == (f"{TRIGGER} How is tea made?", BEHAVIOUR)
    assert tagged.completions[0].finish == "stop"


def test_a_cut_answer_teaches_no_end():
    plain, _ = Organism().make([answered("Tell a story.", "Once upon", finish="length")], MODEL)
    assert plain.completions[0].finish == "length"


def test_other_turns_stay_and_the_tag_comes_before_the_last_request():
    sent = (Message(role="system", content="Be brief."), *user("Hi"))
    _, tagged = Organism(trigger="#x#").make([answered("Hi", "Hello.", sent=sent)], MODEL)
    assert [m.content for m in tagged.prompt.messages] == ["Be brief.", "#x# Hi"]


def test_answers_that_are_missing_or_not_scored_give_nothing():
    assert Organism().make([answered("a", "  "), answered("b", "yes", outcome="not_scored")], MODEL) == []


def test_an_empty_trigger_is_an_error():
    with pytest.raises(ValueError, match="every prompt would have it"):
        Organism(trigger=" ")
