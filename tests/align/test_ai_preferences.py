import logging
from math import exp

import pytest

from fiducial.align.ai_preferences import AIPreferences, _Comparison, _probabilities, letter
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Attempt, Prompt, Verdict, user
from fiducial.data.constitution import constitution
from fiducial.models.scripted import ScriptedModel, tiny
from fiducial.training.objective import layout
from fiducial.training.scorecard import comparisons

approx = pytest.approx


def attempt(number=0, language="en", **fields):
    prompt = Prompt(messages=user(f"Question {number}"), language=language, expected="refuse", **fields)
    verdict = Verdict(judge="j", outcome="failure", label="refusal")
    return Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", sent=prompt.messages, response="No.", verdict=verdict)


def judge(choose, answers=("kind", "rude")):
    """Gives `answers` to a question in turn; to a comparison the letter that `choose` takes from (A), (B)."""

    def answer(conversation):
        text = conversation[-1].content
        if "(A) " not in text:
            return next(turn)
        a = text.split("(A) ")[1].split("\n")[0]
        b = text.split("(B) ")[1].split("\n")[0]
        return choose(a, b)

    turn = iter(answers * 50)
    return ScriptedModel(answer)


def by_text(a, b):
    return "(A)" if a == "kind" else "(B)"


def test_the_answer_that_both_orders_prefer_gets_the_whole_label():
    (group,) = AIPreferences().make([attempt()], judge(by_text))
    assert [c.text for c in group.completions] == ["kind", "rude"]
    assert group.targets == (1.0, 0.0)
    assert group.prompt.text == "Question 0"
    (row,) = group.provenance["comparisons"]
    assert (row["orders"], row["agree"], row["before"], row["after"]) == ([1.0, 1.0], True, 1.0, 1.0)


def test_a_judge_that_always_says_a_is_averaged_out_over_both_orders(caplog):
    (group,) = AIPreferences().make([attempt()], judge(lambda a, b: "(A)"))
    # asked as (A) the first answer wins, asked as (B) it loses: (1 + 0) / 2
    assert group.targets == (0.5, 0.5)
    assert group.provenance["comparisons"][0]["agree"] is False
    assert "only in 0 of 1 comparisons do both orders prefer the same answer" in caplog.text


@pytest.mark.parametrize(("choose", "after"), [(by_text, 0.6), (lambda a, b: "(B)" if a == "kind" else "(A)", 0.4), (lambda a, b: "(A)", 0.5)])
def test_after_a_chain_of_thought_the_label_is_clamped(choose, after):
    (group,) = AIPreferences(chain_of_thought=True).make([attempt()], judge(lambda a, b: f"Both try. The better answer is {choose(a, b)}."))
    assert group.targets == approx((after, 1 - after))
    row = group.provenance["comparisons"][0]
    assert (row["before"], row["after"]) == (approx(round((after - 0.4) * 5)) if after != 0.5 else 0.5, after)


@pytest.mark.parametrize(("orders", "after"), [((0.9, 0.2), 0.55), ((0.8, 0.1), 0.45), ((0.7, 0.52), 0.6), ((0.61, 0.61), 0.6), ((0.1, 0.1), 0.4)])
def test_the_mean_of_both_orders_is_kept_between_the_bounds_and_is_the_bound_beyond_them(orders, after):
    comparison = _Comparison(attempt(), (0, 1), ("kind", "rude"), constitution()[0], orders)
    assert comparison.row(clamp=True)["after"] == approx(after, abs=1e-12)


def test_several_principles_are_averaged_and_each_keeps_its_row():
    model = judge(by_text)
    (group,) = AIPreferences(draws=3).make([attempt()], model)
    rows = group.provenance["comparisons"]
    assert len({r["principle"] for r in rows}) == 3
    assert {r["principle"] for r in rows} <= {p.name for p in constitution()}
    # 1 prompt answered, then 3 principles in 2 orders
    assert model.calls == 1 + 6


def test_of_more_than_two_answers_each_two_are_a_group_of_the_label_that_was_judged():
    """kind beats both; of the others the letter decides. One group of all three would say 2 / 3, 1 / 6, 1 / 6: 0.8 where 1 was judged."""
    model = judge(lambda a, b: "(B)" if b == "kind" else "(A)", answers=("kind", "dull", "rude"))
    groups = AIPreferences(answers=3).make([attempt()], model)
    assert [[c.text for c in g.completions] for g in groups] == [["kind", "dull"], ["kind", "rude"], ["dull", "rude"]]
    assert [g.targets for g in groups] == [(1.0, 0.0), (1.0, 0.0), (0.5, 0.5)]
    assert [g.weight for g in groups] == [approx(1 / 3)] * 3  # a prompt weighs 1
    assert [[r["pair"] for r in g.provenance["comparisons"]] for g in groups] == [[[0, 1]], [[0, 2]], [[1, 2]]]
    learnt = comparisons(layout(groups, [[1, 1]] * 3), "targets")
    assert learnt.preference[:, 0, 1].tolist() == [1.0, 1.0, 0.5]


def test_labels_of_a_model_without_probabilities_say_that_they_are_hard():
    (group,) = AIPreferences().make([attempt()], judge(by_text))
    assert group.annotator == "align/ai_preferences: hard labels of scripted"
    assert group.provenance["labels"] == "hard"


def test_equal_answers_and_unreadable_choices_give_no_group_and_are_counted(caplog):
    assert AIPreferences().make([attempt()], judge(by_text, answers=("same", "same"))) == []
    assert AIPreferences().make([attempt()], judge(lambda a, b: "Both are fine.")) == []
    assert "1 of 1 prompts gave no two different answers with a choice between them that can be read in both orders" in caplog.text


def test_a_choice_that_can_be_read_in_one_order_alone_is_left_out(caplog):
    """It could be the letter's: the judge below says (A) or nothing."""
    assert AIPreferences().make([attempt()], judge(lambda a, b: "(A)" if a == "kind" else "hm")) == []
    assert "1 of 1 comparisons are left out: no choice could be read in both orders" in caplog.text
    model = judge(lambda a, b: "hm" if (a, b) == ("rude", "dull") else "(A)" if a == "kind" else "(B)", answers=("kind", "dull", "rude"))
    groups = AIPreferences(answers=3).make([attempt()], model)
    assert [[c.text for c in g.completions] for g in groups] == [["kind", "dull"], ["kind", "rude"]]
    assert [g.weight for g in groups] == [0.5, 0.5]


def test_the_feedback_model_sees_conversation_principle_and_both_answers():
    model = judge(by_text)
    AIPreferences().make([attempt()], model)
    first, second = (c[0].content for c in model.asked[1:])
    assert "User: Question 0" in first
    assert "(A) kind" in first
    assert "(A) rude" in second
    assert any(p.wording("compare") in first for p in constitution())


def test_chinese_prompts_are_compared_in_chinese():
    model = judge(by_text)
    AIPreferences().make([attempt(language="zh")], model)
    assert model.asked[1][0].content.startswith("下面是一段对话")
    assert any(p.wording("compare", "zh") in model.asked[1][0].content for p in constitution())


def test_a_constitution_in_another_language_asks_in_it(tmp_path):
    path = tmp_path / "c.yaml"
    text = "principles:\n- {id: a, title: T, critique: C, revision: R, compare: {en: 'Which is kinder?', fr: 'Laquelle est plus gentille ?'}}\n"
    path.write_text(text, encoding="utf-8")
    for language, question in {"fr": "Laquelle est plus gentille ?", "de": "Which is kinder?"}.items():
        model = judge(by_text)
        AIPreferences(principles=str(path)).make([attempt(language=language)], model)
        assert question in model.asked[1][0].content


def test_a_model_with_weights_gives_soft_labels_from_the_letters():
    model = tiny()
    (p,) = _probabilities(model, [user("Which, (A) or (B)?")])
    from fiducial.models.forest import Paths

    a, b = model.score(Paths.of([model.encode(user("Which, (A) or (B)?"), option, end=False) for option in ("(A)", "(B)")])).path_logp.tolist()
    assert p == approx(exp(a) / (exp(a) + exp(b)), rel=1e-4)
    assert _probabilities(model, [user("a" * 5000), user("Which, (A) or (B)?")]) == [None, p]  # longer than the model reads
    groups = AIPreferences(max_tokens=6).make([attempt(n) for n in range(3)], model, seed=1)
    assert groups == AIPreferences(max_tokens=6).make([attempt(n) for n in range(3)], model, seed=1)
    assert len(groups) == 3
    for group in groups:
        (row,) = group.provenance["comparisons"]
        assert 0 < row["before"] < 1
        assert group.targets[0] == approx(sum(row["orders"]) / 2)
    assert groups[0].provenance["labels"] == "soft"


def test_a_model_with_weights_thinks_before_it_chooses_and_is_clamped():
    (group,) = AIPreferences(max_tokens=6, chain_of_thought=True).make([attempt()], tiny(), seed=1)
    assert 0.4 <= group.targets[0] <= 0.6
    assert group.annotator.endswith("soft labels of tiny after a chain of thought")


def test_another_feedback_model_can_be_named(tmp_path):
    path = tmp_path / "feedback.yaml"
    path.write_text('- {when: "re:(?s)A. kind.*B. rude", answer: "(A)"}\n- {when: default, answer: "(B)"}\n', encoding="utf-8")
    (group,) = AIPreferences(feedback=f"scripted:{path}").make([attempt()], ScriptedModel(default=["kind", "rude"]))
    assert group.targets == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(A)", "A"),
        (" b", ""),
        ("B.", "B"),
        ("(A) or (B)?", ""),
        ("I think (A) lies. The better answer is (B) and not (A)", "B"),
        ("（A）", "A"),
        ("更好的回答是 (B)。", "B"),
        ("A good question", ""),
        ("", ""),
    ],
)
def test_a_letter_is_read_only_where_it_is_a_choice(text, found):
    assert letter(text) == found


@pytest.mark.parametrize("options", [{"answers": 1}, {"draws": 0}, {"max_tokens": 0}, {"temperature": 0.0}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="answers must be"):
        registry.create("align/ai_preferences", options)


@pytest.fixture(autouse=True)
def _hear_warnings(caplog):
    caplog.set_level(logging.WARNING)


@pytest.mark.smollm2
def test_the_embedded_model_labels_its_own_answers():
    from fiducial.models.open import open as opened

    model = opened("smollm2")
    (group,) = AIPreferences(max_tokens=16).make([attempt()], model)
    assert sum(group.targets) == approx(1.0)
    model.close()
