from math import isnan

import pytest

from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.data.annotators import Vote, dawid_skene, krippendorff, read_votes, votes_of
from fiducial.data.rows import Row

approx = pytest.approx

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: four observers, twelve units, five values; a dot is missing
FOUR = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def published():
    return [Vote(f"unit {u}", "ABCD"[k], value) for k, row in enumerate(FOUR) for u, value in enumerate(row, 1) if value != "."]


@pytest.mark.parametrize(("scale", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(scale, alpha):
    found = krippendorff(published(), scale)
    assert found.alpha == approx(alpha, abs=5e-4)
    assert found.low < found.alpha < found.high <= 1
    assert (found.items, found.labels) == (11, 40)  # one unit has a single value, which cannot be paired


def test_alpha_of_two_annotators_by_hand():
    # items: aa, aa, bb, ab. Coincidences: aa 4, bb 2, ab and ba 1 each; margins a 5, b 3, n 8.
    # observed disagreement 2, expected 2 * 5 * 3 / 7 = 30 / 7; alpha = 1 - 2 * 7 / 30 = 8 / 15
    votes = [Vote(str(i), who, label) for i, pair in enumerate(["aa", "aa", "bb", "ab"]) for who, label in zip("xy", pair, strict=True)]
    assert krippendorff(votes).alpha == approx(8 / 15)


def test_perfect_agreement_is_one_and_systematic_disagreement_below_zero():
    agree = [Vote(str(i), who, "ab"[i % 2]) for i in range(6) for who in "xyz"]
    assert krippendorff(agree).alpha == 1.0
    assert krippendorff(agree).low == 1.0
    differ = [Vote(str(i), who, label) for i in range(6) for who, label in zip("xy", "ab", strict=True)]
    assert krippendorff(differ).alpha < 0


def test_alpha_does_not_depend_on_order_or_on_who_is_who():
    votes = published()
    renamed = [Vote(v.item, {"A": "D", "D": "A"}.get(v.annotator, v.annotator), v.label) for v in reversed(votes)]
    assert krippendorff(renamed).alpha == approx(krippendorff(votes).alpha)


def test_where_nothing_can_differ_alpha_is_not_defined():
    alike = [Vote("1", "x", "a"), Vote("1", "y", "a")]
    assert isnan(krippendorff(alike).alpha)
    assert isnan(krippendorff([Vote("1", "x", "a"), Vote("2", "y", "b")]).alpha)
    assert isnan(krippendorff([]).alpha)


@pytest.mark.parametrize("scale", ["nominal", "ordinal", "interval"])
def test_a_number_is_one_label_however_it_is_written(scale):
    grades = ["1", "2", "3", "2", "1", "3"]
    writings = {"x": "{}", "y": "{}.0", "z": " 0{}"}
    rows = [Row("f:1", {"item": i, "annotator": who, "label": how.format(g)}) for i, g in enumerate(grades) for who, how in writings.items()]
    votes = read_votes(rows)
    assert krippendorff(votes, scale).alpha == 1.0
    assert dawid_skene(votes).labels == ("1", "2", "3")
    assert read_votes([Row("f:1", {"item": 1, "annotator": "x", "label": 2.5}), Row("f:2", {"item": 1, "annotator": "y", "label": "2.50"})]) == [
        Vote("1", "x", "2.5"),
        Vote("1", "y", "2.5"),
    ]


@pytest.mark.parametrize("label", ["A1", "1_000", "nan", "inf", "1" * 40, "1e999999"])
def test_a_label_that_is_no_plain_number_stays_as_it_is(label):
    assert read_votes([Row("f:1", {"item": 1, "annotator": "x", "label": label})])[0].label == label


def test_ordinal_and_interval_need_numbers():
    with pytest.raises(DataError, match="the label 'a' is no number"):
        krippendorff([Vote("1", "x", "a"), Vote("1", "y", "b")], "interval")
    far, near = (
        krippendorff([Vote(str(i), w, v) for i, p in enumerate(pairs) for w, v in zip("xy", p, strict=True)], "interval").alpha
        for pairs in ([("1", "9"), ("1", "1"), ("9", "9")], [("8", "9"), ("1", "1"), ("9", "9")])
    )
    assert near > far


def test_the_interval_narrows_with_items_and_repeats_under_a_seed():
    small, large = published(), [v._replace(item=f"{v.item}/{k}") for k in range(9) for v in published()]
    a, b = krippendorff(small, seed=1), krippendorff(large, seed=1)
    assert b.high - b.low < a.high - a.low
    assert krippendorff(small, seed=1) == a != krippendorff(small, seed=2)


def test_one_round_of_dawid_and_skene_by_hand():
    # two items, three annotators: x and y say a, b; z says a, a. Start: item 1 all a -> (1, 0); item 2 votes b, b, a -> (1/3, 2/3).
    votes = [Vote("1", w, "a") for w in "xyz"] + [Vote("2", "x", "b"), Vote("2", "y", "b"), Vote("2", "z", "a")]
    found = dawid_skene(votes)
    assert found.labels == ("a", "b")
    # x and y agree with each other, so item 2 settles on b, and z is right about a alone
    assert found.items["1"] == approx((1.0, 0.0), abs=0.01)
    assert found.items["2"] == approx((0.0, 1.0), abs=0.01)
    assert found.prior == approx((0.5, 0.5), abs=0.01)
    assert found.accuracy("x") == approx(0.99, abs=0.01)
    assert found.accuracy("z") == approx(0.5, abs=0.01)
    # z said a of item 2, whose truth is b: (1 + 0.01) / (1 + 2 * 0.01)
    assert found.confusion["z"][1] == approx((1.01 / 1.02, 0.01 / 1.02), abs=1e-3)


def simulated(n=300, seed=0):
    import random

    rng = random.Random(seed)
    skills = {"a": 0.95, "b": 0.9, "c": 0.85, "guess 1": 0.5, "guess 2": 0.5, "guess 3": 0.5, "guess 4": 0.5}
    truth = [rng.choice("ab") for _ in range(n)]
    votes = [Vote(str(i), who, t if rng.random() < skill else "ab"[t == "a"]) for i, t in enumerate(truth) for who, skill in skills.items()]
    return truth, votes, skills


def test_reliable_annotators_weigh_more_than_the_majority():
    truth, votes, skills = simulated()
    found = dawid_skene(votes)
    settled = ["ab"[p[1] > p[0]] for p in found.items.values()]
    majority = ["ab"[sum(v.label == "b" for v in votes[7 * i : 7 * i + 7]) > 3] for i in range(len(truth))]
    right, crowd = (sum(a == b for a, b in zip(s, truth, strict=True)) for s in (settled, majority))
    assert right > crowd + 20
    for who, skill in skills.items():
        assert found.accuracy(who) == approx(skill, abs=0.08)


def test_probabilities_sum_to_one_and_missing_votes_are_allowed():
    found = dawid_skene(published())
    assert len(found.items) == 12
    assert all(sum(p) == approx(1.0) for p in found.items.values())
    assert all(sum(row) == approx(1.0) for table in found.confusion.values() for row in table)
    assert sum(found.prior) == approx(1.0)
    assert dawid_skene([]).items == {}


def test_a_label_outside_the_classes_is_named():
    with pytest.raises(DataError, match="the label 'c' of item '1' is none of a, b"):
        dawid_skene([Vote("1", "x", "c")], ["a", "b"])


def test_rows_without_who_or_what_are_named():
    assert read_votes([Row("f:1", {"Item": 3, "annotator": "x", "LABEL": 1})]) == [Vote("3", "x", "1")]
    with pytest.raises(DataError, match="f:2: no annotator and no label"):
        read_votes([Row("f:2", {"item": 3, "label": " "})])


def test_preferences_are_votes_whatever_the_order_of_the_answers():
    def group(first, second, annotator, rewards=(1.0, 0.0), question="Q"):
        completions = (Completion(text=first), Completion(text=second))
        return Group(prompt=Prompt(messages=user(question)), completions=completions, rewards=rewards, annotator=annotator)

    said = [group("kind", "rude", "x"), group("rude", "kind", "y"), group("kind", "rude", "z", (0.0, 1.0))]
    votes, items = votes_of([*said, group("kind", "rude", ""), group("a", "b", "x", (1.0, 1.0))])
    (item,) = items
    # answers in the order of their text: kind, rude; x prefers 0, y and z prefer 1
    assert votes == [Vote(item, "x", "0"), Vote(item, "y", "1"), Vote(item, "z", "1")]
    assert [c.text for c in items[item].completions] == ["kind", "rude"]
    assert items[item].rewards is None
