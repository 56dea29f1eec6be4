import json
import random

import pytest

from fiducial.align.probing import Case, Prober, identified
from fiducial.align.taxonomy import Point, read_taxonomy
from fiducial.core.errors import DataError
from fiducial.core.intervals import Rate
from fiducial.core.records import Completion
from fiducial.data.checks import Check
from fiducial.data.split import split_of
from fiducial.models.scripted import ScriptedModel

SHIPPED = read_taxonomy()
SUMS = next(p for points in SHIPPED.tasks.values() for p in points if p.check == "sum")
OPEN = Point("writing", "verse", "rhymes")


def prober(model, *, examiner=None, expert=None, assessor=None, language="en", requests=()):
    return Prober(model, examiner, expert, assessor, language, requests or SHIPPED.requests[language], SHIPPED, 64, 0)


def reckons(conversation):
    """Answers sums of numbers below 20 rightly, others wrongly."""
    a, b = (int(n) for n in conversation[-1].content.removeprefix("What is ").rstrip("?").split(" + "))
    return str(a + b if a < 20 and b < 20 else 0)


def test_the_shipped_taxonomy_is_checked_throughout():
    assert {task: len(points) for task, points in SHIPPED.tasks.items()} == {"length": 3, "format": 3, "keywords": 3, "arithmetic": 3}
    assert all(p.check for points in SHIPPED.tasks.values() for p in points)
    assert [len(SHIPPED.requests[z]) for z in ("en", "zh")] == [10, 10]


def test_a_taxonomy_of_ones_own_may_have_open_points_and_says_what_is_wrong(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"tasks": [{"task": "writing", "categories": {"verse": ["rhymes", {"point": "short", "check": "words_at_most"}]}}]}))
    found = read_taxonomy(str(path))
    assert found.tasks["writing"] == [Point("writing", "verse", "rhymes"), Point("writing", "verse", "short", "words_at_most")]
    assert found.words == SHIPPED.words
    for text, message in [
        ("{", "not JSON"),
        ("[]", "cannot be read"),
        ('{"tasks": []}', "no points"),
        ('{"tasks": [{"task": "a", "categories": {"b": [{"point": "c", "check": "rhyme"}]}}]}', "no check 'rhyme'"),
        ('{"tasks": [{"task": "a", "categories": {"b": [3]}}]}', "cannot be read"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_taxonomy(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        read_taxonomy(str(tmp_path / "none.json"))


def test_cases_get_harder_as_long_as_they_are_answered():
    model = ScriptedModel(reckons)
    cases = prober(model).probe(SUMS, 15)
    assert len(cases) == len({c.text for c in cases}) == model.calls == 15
    assert [c.score for c in cases[:2]] == [10.0, 10.0]  # numbers up to ten
    failed = [c.failed for c in cases]
    assert sum(failed[5:]) > sum(failed[:5])
    assert all(c.check.result() > 20 for c in cases if c.failed)


def test_requirements_of_form_are_added_to_a_request_which_alone_decides_the_half():
    point = SHIPPED.tasks["length"][0]
    cases = prober(ScriptedModel(default="word " * 99)).probe(point, 10)
    assert all(c.text.startswith(c.key) and "Use at most" in c.text for c in cases)
    assert all(c.half == ("training" if split_of(c.key, "weakness") == "repair" else "held-out") for c in cases)
    by_request = {}
    for case in cases:
        by_request.setdefault(case.key, set()).add(case.half)
    assert all(len(halves) == 1 for halves in by_request.values())
    assert {h for halves in by_request.values() for h in halves} == {"training", "held-out"}


def test_a_failed_answer_has_no_mark_and_shows_nothing():
    cases = prober(ScriptedModel(default=Completion(text="", finish="error", error="down"))).probe(SUMS, 3)
    assert [(c.score, c.failed) for c in cases] == [(None, False)] * 3


def test_a_reference_comes_from_the_check_the_expert_or_the_models_own_tries():
    arithmetic = Case(SUMS, "What is 2 + 3?", "2 + 3", Check(kind="sum", value="2 + 3"))
    form = Case(SHIPPED.tasks["length"][0], "Say it. Use at most 2 words.", "Say it.", Check(kind="words_at_most", value=2))
    model = ScriptedModel(default=["far too many words", "so many words", "just two"])
    assert prober(model).reference(arithmetic) == "2 + 3 = 5."
    assert prober(model).reference(form) == "just two"
    assert prober(model, expert=ScriptedModel(default="well said")).reference(form) == "well said"
    assert prober(ScriptedModel(default="never short enough")).reference(form) == ""
    assert prober(model).reference(Case(OPEN, "Rhyme.", "Rhyme.", reference="Time, rhyme.")) == "Time, rhyme."


def judges(marks):
    """An assessor: yes to every point, and the next of `marks` for every answer."""
    turn = iter(marks * 99)
    return ScriptedModel(lambda c: next(turn) if c[-1].content.startswith("Mark") else "Yes.")


def test_an_open_point_is_written_by_the_examiner_answered_by_the_expert_and_marked_by_the_assessor():
    harder = iter(range(99))
    examiner = ScriptedModel(
        lambda c: "1. Rhyme on cat.\n2. Rhyme on the dog." if "from easy to hard" in c[-1].content else f"Rhyme number {next(harder)} on bees."
    )
    expert, assessor = ScriptedModel(default="A hat for the cat."), judges(["Weak. [[2]]", "[[9]]", "no mark"])
    cases = prober(ScriptedModel(default="No."), examiner=examiner, expert=expert, assessor=assessor).probe(OPEN, 4)
    assert [c.text for c in cases] == ["Rhyme on cat.", "Rhyme on the dog.", "Rhyme number 0 on bees.", "Rhyme number 1 on bees."]
    assert [c.score for c in cases] == [2.0, 9.0, None, 2.0]
    assert [c.failed for c in cases] == [True, False, False, True]
    assert {c.reference for c in cases} == {"A hat for the cat."}
    shown = examiner.asked[1][-1].content
    assert "- Rhyme on cat. (2)" in shown
    assert "- Rhyme on the dog. (9)" in shown
    assert "Reference answer:\nA hat for the cat." in assessor.asked[0][-1].content


def test_a_request_that_was_cut_off_is_no_case():
    def write(conversation):
        return Completion(text="1. Rhyme on the cat.\n2. Write a sonnet about the", finish="length")

    cases = prober(ScriptedModel(), examiner=ScriptedModel(write), expert=ScriptedModel(default="x"), assessor=judges(["[[5]]"])).probe(OPEN, 2)
    assert [c.text for c in cases] == ["Rhyme on the cat."]


@pytest.mark.parametrize(
    ("language", "alike", "other"),
    [("en", "Write a poem on {}.", "Rhyme on the number {}."), ("zh", "请写一首诗写{}。", "请为{}押韵作诗。")],
)
def test_the_examiner_is_shown_five_cases_that_begin_unlike_and_two_that_failed(language, alike, other):
    point = [Case(OPEN, alike.format(c), "k", score=9.0) for c in "abcdef"]
    unlike = [Case(OPEN, f"{w} " + other.format(i), "k", score=9.0) for i, w in enumerate("pqrs")]
    failed = [Case(OPEN, f"{w} " + other.format(i), "k", score=1.0) for i, w in enumerate("xyz")]
    for seed in range(20):
        shown = prober(ScriptedModel(), language=language)._shown([*point, *unlike, *failed], random.Random(seed))
        assert len(shown) == 5
        assert sum(c.failed for c in shown) >= 2
        assert sum(c in point for c in shown) <= 1
    # where fewer begin unlike, fewer are shown
    assert len(prober(ScriptedModel(), language=language)._shown([*point, failed[0]], random.Random(0))) == 2


def test_a_case_without_a_mark_is_none_of_those_that_the_share_found_is_of():
    assert identified([Case(OPEN, "a", "a", score=s) for s in (1.0, 3.0, 9.0, None)]) == Rate(2, 3)


def test_requests_that_say_the_same_are_asked_once():
    examiner = ScriptedModel(default="Rhyme on the cat.\nRhyme on the cat!\nRhyme on the dog and on the bee.")
    cases = prober(ScriptedModel(), examiner=examiner, expert=ScriptedModel(default="x"), assessor=judges(["[[5]]"])).probe(OPEN, 5)
    assert [c.text for c in cases] == ["Rhyme on the cat.", "Rhyme on the dog and on the bee."]


def test_the_examiner_sees_means_and_failures_and_proposes_or_stops():
    model = ScriptedModel()
    bad = Case(OPEN, "Rhyme on orange.", "k", score=1.0)
    good = Case(OPEN, "Rhyme on cat.", "k", score=10.0)
    examiner = ScriptedModel(default="1. metre: hexameters")
    found = prober(model, examiner=examiner).propose("writing", [bad, good], [OPEN])
    assert found == Point("writing", "metre", "hexameters")
    assert "- verse: rhymes (5.5)\n  Rhyme on orange." in examiner.asked[0][-1].content
    assert prober(model, examiner=ScriptedModel(default="Enough. [[Stop]]")).propose("writing", [], []) is None
    assert prober(model, examiner=ScriptedModel(default="hexameters")).propose("writing", [], []).name == ""


def test_the_examiner_is_told_what_was_rejected_and_asked_with_another_seed():
    seeds = []

    class Examiner(ScriptedModel):
        def sample(self, conversations, **options):
            seeds.append(options["seed"])
            return super().sample(conversations, **options)

    examiner = Examiner(lambda c: "verse: odes" if "verse: hymns" in c[-1].content else "verse: hymns")
    asks = prober(ScriptedModel(), examiner=examiner)
    first = asks.propose("writing", [], [OPEN])
    assert "rejected" not in examiner.asked[0][-1].content
    assert first == Point("writing", "verse", "hymns")
    assert asks.propose("writing", [], [OPEN], [first]) == Point("writing", "verse", "odes")
    assert "rejected, name another one: verse: hymns.\nName one further" in examiner.asked[1][-1].content
    assert len(set(seeds)) == 2


def test_a_proposed_point_must_be_new_markable_and_accepted():
    examiner, expert = ScriptedModel(), ScriptedModel()
    full = prober(ScriptedModel(), examiner=examiner, expert=expert, assessor=judges([""]))
    new = Point("writing", "metre", "hexameters")
    assert full.accepts(new, [OPEN])
    assert not full.accepts(Point("writing", "other", "Rhymes!"), [OPEN])
    assert not full.accepts(Point("writing", "metre", ""), [OPEN])
    assert not prober(ScriptedModel(), examiner=examiner).accepts(new, [OPEN])
    assert not prober(ScriptedModel(), examiner=examiner, expert=expert, assessor=ScriptedModel(default="No, it is music.")).accepts(new, [OPEN])


def test_the_same_seed_makes_the_same_cases():
    rng = random.Random(0)
    texts = [[c.text for c in prober(ScriptedModel(reckons)).probe(SUMS, 12)] for _ in range(2)]
    assert texts[0] == texts[1]
    assert rng.random() == random.Random(0).random()  # nothing global was drawn from
