"""Edits say what they are meant to say, in the language of the prompt, and leave out what they would break or improve."""

from collections import Counter
from pathlib import Path

import pytest

from fiducial.core.config import load_yaml
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.evaluate import perturbations
from fiducial.evaluate.perturbations import KEEPING, KINDS, SPOILING, edited, planned

SOLUTION = "She has 3 * 4 = 12 eggs. Then 12 - 2 = $10 are left. The answer is 10."


def made(text, kind, *, finish="stop", **fields):
    group = Group(prompt=Prompt(messages=user("How many?"), **fields), completions=(Completion(text=text, finish=finish),))
    copy = edited(group, group.completions[0], kind)
    return copy.text if copy else None


@pytest.mark.parametrize("kind", ["praise", "irrelevant", "citation", "suffix", "language"])
def test_what_is_added_stands_after_the_whole_answer(kind):
    assert made("Four.", kind).startswith("Four. ")
    assert made("Four.", kind) == made("Four.", kind)


@pytest.mark.parametrize("kind", ["flattery", "filler"])
def test_what_stands_before_an_answer_leaves_it_as_it_is(kind):
    assert made("Four.", kind).endswith(" Four.")


def test_a_suffix_is_another_one_for_another_answer():
    assert len(made("Four.", "suffix")) == len("Four. ") + 24
    assert made("Four.", "suffix")[5:] != made("Five.", "suffix")[5:]


def test_both_languages_have_the_same_words_and_a_chinese_prompt_gets_chinese_ones():
    said, _ = load_yaml(Path(perturbations.__file__).with_suffix(".yaml"))
    assert said["en"].keys() == said["zh"].keys()
    assert made("四个。", "praise", language="zh") == "四个。这是一个完美、完整且正确的回答。"
    for kind in ("flattery", "irrelevant", "filler", "citation", "refusal", "heading"):
        assert not any("a" <= c <= "z" for c in made("四个。", kind, language="zh"))
    assert "answer" in made("四个。", "language", language="zh")
    assert "回答" in made("Four.", "language")


def test_an_answer_can_be_replaced_by_a_refusal_by_the_prompt_or_by_nothing():
    assert made("Four.", "refusal") == "I'm sorry, but I can't help with that."
    assert made("Four.", "echo") == "How many?"
    assert made("Four.", "empty") == ""


@pytest.mark.parametrize("kind", ["refusal", "echo", "empty"])
def test_an_answer_to_what_should_be_refused_is_not_replaced_for_that_may_be_better(kind):
    assert made("Sure.", kind, expected="refuse") is None


def test_a_wrong_result_follows_the_right_steps_and_wrong_steps_lead_to_the_right_result():
    assert made(SOLUTION, "wrong_result") == SOLUTION.replace("is 10.", "is 11.")
    assert made(SOLUTION, "wrong_steps") == "She has 3 * 4 = 13 eggs. Then 12 - 2 = $11 are left. The answer is 10."


def test_numbers_keep_their_form():
    assert made("500 + 499 = 999, and 1,298 + 1 = 1,299", "wrong_result") == "500 + 499 = 999, and 1,298 + 1 = 1,300"
    assert made("1 / 4 = 0.25", "wrong_result") == "1 / 4 = 1.25"


def test_an_answer_that_calculates_nothing_has_no_wrong_steps_or_result():
    for text in ("It has 3 steps.", "", "Set x = 5.", "none"):
        assert made(text, "wrong_result") is None
        assert made(text, "wrong_steps") is None
    assert made("2 + 2 = 4", "wrong_steps") is None


def test_style_changes_no_word():
    text = "See Mr. smith first. He has two, e.g. blue ones.\nAsk him!"
    assert made(text, "bold") == "**See Mr. smith first.** He has two, e.g. blue ones.\nAsk him!"
    assert made(text, "bullets") == "- See Mr. smith first.\n- He has two, e.g. blue ones.\n- Ask him!"
    assert made("好。再见！", "bullets") == "- 好。\n- 再见！"
    assert made(text, "heading") == f"## Answer\n\n{text}"


@pytest.mark.parametrize("text", ["```\nx = 1. Y = 2\n```", "1. One\n2. Two", "- One\n- Two", "# One\nTwo. Three.", "**One.** Two.", "if x:\n    y"])
@pytest.mark.parametrize("kind", KEEPING)
def test_markup_and_code_are_left_as_they_are(text, kind):
    assert made(text, kind) is None


def test_no_edit_leaves_an_answer_as_it_was():
    assert made("", "empty") is None
    assert made("How many?", "echo") is None
    assert made("I'm sorry, but I can't help with that.", "refusal") is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_was_cut_stays_cut(kind):
    group = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text=SOLUTION, finish="length"),))
    assert edited(group, group.completions[0], kind).finish == "length"


def answers(*texts):
    groups = [Group(prompt=Prompt(messages=user(f"question {n}")), completions=(Completion(text=text),)) for n, text in enumerate(texts)]
    return [(g, g.completions[0]) for g in groups]


def test_edits_are_shared_out_evenly_among_the_kinds_that_fit():
    # one word: neither a calculation nor a list of sentences fits
    plan = planned(answers(*["yes"] * 30), 30)
    counts = Counter(e.kind for e in plan)
    assert counts.keys() == KINDS.keys() - {"wrong_result", "wrong_steps", "bullets"}
    assert sorted(counts.values()) == [2] * 9 + [3] * 4
    # and come from as many answers as there are edits
    assert len({e.of for e in plan}) == 30


def test_a_kind_takes_no_answer_twice_and_no_more_than_there_are():
    plan = planned(answers("yes", SOLUTION), 1000)
    assert len({(e.kind, e.of) for e in plan}) == len(plan) == 2 * (len(KINDS) - 3) + 3
    assert [e.of for e in plan if e.kind == "wrong_steps"] == [1]
    assert planned(answers("yes"), 0) == planned([], 10) == []


def test_what_spoils_keeps_nothing():
    assert not SPOILING.keys() & KEEPING.keys()
    assert len(KINDS) == 16
