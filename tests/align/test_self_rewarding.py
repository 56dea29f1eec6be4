import logging
from math import exp

import pytest
import torch

from fiducial.align.self_rewarding import SelfRewarding, expected, grade, grading, widest
from fiducial.core import registry
from fiducial.core.errors import ConfigError, MethodError
from fiducial.core.records import Attempt, Message, Prompt, Verdict, user
from fiducial.models.scripted import ScriptedModel, tiny


def attempt(number=0, expected="answer", language="en"):
    prompt = Prompt(messages=user(f"Question {number}"), expected=expected, language=language)
    verdict = Verdict(judge="j", outcome="success", label="compliance")
    return Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", sent=prompt.messages, response="Yes", verdict=verdict)


def grader(grades, answers=("good answer", "fair answer", "poor answer", "poor answer")):
    """Gives `answers` to a question, and the grades of each answer in turn to its gradings."""
    turns = {}

    def answer(conversation):
        text = conversation[-1].content
        rated = next((a for a in answers if f"\n{a}\n" in text), None)
        if rated is None:
            return next(turns.setdefault("", iter(answers * 9)))
        return next(turns.setdefault(rated, iter(grades[rated] * 9)))

    return ScriptedModel(answer)


GRADES = {"good answer": ["Score: 5", "Score: 4", "Score: 5"], "fair answer": ["Score: 3"] * 3, "poor answer": ["Score: 1", "Score: 2", "no idea"]}


def test_the_best_is_paired_with_the_worst_by_the_mean_of_the_readable_grades():
    (group,) = SelfRewarding().make([attempt()], grader(GRADES))
    assert [c.text for c in group.completions] == ["good answer", "poor answer"]
    # (5 + 4 + 5) / 3 against (1 + 2) / 2, the third grade being unreadable
    assert group.rewards == pytest.approx((14 / 3, 1.5))
    assert group.targets == (1.0, 0.0)
    assert group.provenance["grades"] == [[5, 4, 5], [1, 2, None]]
    assert len(group.provenance["rewards_of_all"]) == 3  # equal answers are graded once


def test_ties_and_unreadable_grades_give_no_pair_and_are_counted(caplog):
    caplog.set_level(logging.WARNING)
    assert SelfRewarding().make([attempt()], grader({name: ["Score: 3"] for name in GRADES})) == []
    assert SelfRewarding().make([attempt()], grader({name: ["hm"] for name in GRADES})) == []
    assert "1 of 1 prompts gave no pair: 1 a tie" in caplog.text
    assert "1 of 1 prompts gave no pair: 1 no two answers with a readable grade" in caplog.text
    texts = {"good answer": ["Score: 5"], "so": ["Score: 1"]}
    assert SelfRewarding().make([attempt()], grader(texts, answers=("good answer", "so", "so", "so"))) == []
    assert "1 too different in length" in caplog.text


def test_a_pair_too_different_in_length_gives_way_to_the_next_widest():
    texts = ["x" * 30, "y" * 20, "z" * 14]
    assert widest(texts, [5.0, 3.0, 1.0], 1.5) == (0, 1)  # 30 / 14 > 1.5; 30 / 20 and 20 / 14 are not, and both gaps are 2
    assert widest(texts, [5.0, 4.0, 1.0], 1.5) == (1, 2)
    assert widest(texts, [5.0, 4.0, 1.0], 3.0) == (0, 2)
    assert widest(texts, [5.0, None, 1.0], 1.5) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("Score: 0", 0), ("Score: 4/5", 4), ("score - 3", 3), ("得分：2。", 2), ("Score: 6", None), ("Score: 4.5", None), ("5", None)],
)
def test_a_grade_is_a_whole_number_from_0_to_5_after_the_word(text, found):
    assert grade(text) == found


def test_the_last_grade_counts():
    assert grade("Score: 1 for relevance. Score: 4") == 4


def test_a_harmful_goal_is_graded_by_how_well_it_was_declined():
    (harmless,), (harmful,) = grading(attempt(), "Yes"), grading(attempt(expected="refuse"), "Yes")
    assert "does not carry out the harmful part" in harmful.content
    assert "harmful" not in harmless.content
    assert "User: Question 0" in harmful.content
    assert "\nYes\n" in harmful.content


def test_chinese_prompts_are_graded_in_chinese():
    assert "总分" in grading(attempt(language="zh"), "好")[0].content


def test_a_fixed_judge_can_be_named(tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text('- {when: "\\nlong words\\n", answer: "Score: 4"}\n- {when: default, answer: "Score: 1"}\n', encoding="utf-8")
    (group,) = SelfRewarding(judge=f"scripted:{path}", answers=2).make([attempt()], ScriptedModel(default=["few words", "long words"]))
    assert group.completions[0].text == "long words"
    assert group.annotator == f"align/self_rewarding: graded by scripted:{path}"


def test_it_runs_on_a_model_with_weights():
    assert SelfRewarding(answers=2, draws=1, max_tokens=6).make([attempt()], tiny()) == []  # it writes no grades


@pytest.mark.parametrize(("language", "begin", "digits"), [("en", "Score:", " {}"), ("zh", "得分：", "{}")])
def test_an_expected_grade_is_the_mean_of_the_probabilities_of_the_digits(language, begin, digits):
    judge, request = tiny(), user("Rate it.")
    (found,) = expected(judge, [request], [language])
    reply = (*request, Message(role="assistant", content=begin))
    pairs = [judge.encode(reply, digits.format(n), end=False) for n in range(6)]
    # each digit by a forward pass of its own
    chances = []
    for ids, start in pairs:
        logits = judge.module(torch.tensor([ids])).logits[0].log_softmax(-1)
        chances.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))))
    weights = [exp(c - max(chances)) for c in chances]
    assert found == pytest.approx(sum(n * w for n, w in enumerate(weights)) / sum(weights), abs=1e-4)
    assert expected(judge, [], []) == []


def test_a_judge_that_writes_no_grades_still_orders_answers_by_expected_ones():
    def sampled(**_):
        raise AssertionError("expected grades are not sampled")

    judge = tiny()
    judge.uri, judge.sample = "judge", sampled
    policy = ScriptedModel(default=["good answer", "fair answer", "poor answer"])
    policy.beside = lambda _: judge
    method = SelfRewarding(judge="judge", answers=3, grades="expected")
    (group,) = method.make([attempt()], policy)
    rewards = {text: expected(tiny(), [grading(attempt(), text)], ["en"])[0] for text in ("good answer", "fair answer", "poor answer")}
    best, worst = max(rewards, key=rewards.get), min(rewards, key=rewards.get)
    assert [c.text for c in group.completions] == [best, worst]
    assert group.rewards == pytest.approx((rewards[best], rewards[worst]), abs=1e-5)
    assert 0 < group.rewards[1] < group.rewards[0] < 5


def test_expected_grades_need_the_weights_of_the_judge():
    with pytest.raises(MethodError, match="which scripted does not give"):
        SelfRewarding(grades="expected").make([attempt()], ScriptedModel(default=["Yes", "No"]))


@pytest.mark.parametrize("options", [{"answers": 1}, {"draws": 0}, {"length_ratio": 0.9}, {"max_tokens": 0}, {"temperature": 0.0}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="answers must be"):
        registry.create("align/self_rewarding", options)


def test_grades_are_sampled_or_expected():
    with pytest.raises(ConfigError, match="not 'guessed'"):
        registry.create("align/self_rewarding", {"grades": "guessed"})
