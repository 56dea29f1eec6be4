import random

import pytest

from fiducial.core.errors import DataError
from fiducial.data.checks import KEYS, SAID, Check, make, parsed


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("words_at_most", 3, "Bees carry pollen.", "Bees carry pollen home."),
        ("words_at_most", 4, "蜜蜂采蜜", "蜜蜂在采蜜"),
        ("words_at_least", 3, "Bees carry pollen.", "Bees carry."),
        ("sentences", 2, "It rains. It pours!", "It rains."),
        ("sentences", 2, "下雨了。很大！", "下雨了。"),
        ("sentences", 1, "It costs 3.50 euros", "It costs. Much."),
        ("items", 2, "- tea\n- milk", "Here:\n- tea\n- milk"),
        ("items", 2, "- tea\n\n- milk\n", "1. tea\n2. milk"),
        ("json_keys", ("a", "b"), '{"a": 1, "b": 2}', '{"a": 1, "b": 2, "c": 3}'),
        ("json_keys", ("a",), '```json\n{"a": 1}\n```', 'Sure: {"a": 1}'),
        ("lower_case", "", "all small.", "All small."),
        ("contains", ("rain", "slow river"), "Rain on a slow river", "rain on a river"),
        ("avoids", ("rain",), "Rainy days", "The rain falls"),
        ("contains", ("冬天",), "冬天下雪", "秋天下雪"),
        ("ends_with", "That is all.", "Tea. That is all", "That is all. Tea."),
        ("sum", "12 + 30", "It makes 42.", "It makes 41."),
        ("product", "6 * 7", "6 * 7 = 42", "6 * 7 = 47"),
        ("chain", "2 + 3 * 4", "14", "20"),
        ("sum", "700 + 534", "1,234", "1,235"),
    ],
)
def test_a_check_tells_an_answer_that_keeps_to_it_from_one_that_does_not(kind, value, good, bad):
    check = Check(kind=kind, value=value)
    assert check.holds(good)
    assert not check.holds(bad)
    assert not check.holds(" ")


def test_what_is_said_holds_the_value_in_both_languages():
    assert Check(kind="contains", value=("a", "b")).said() == "Use each of these words: a, b."
    assert Check(kind="contains", value=("甲", "乙")).said("zh") == "必须用到以下词语：甲、乙。"
    assert set(SAID) == {k for k, v in SAID.items() if set(v) == {"en", "zh"}}


@pytest.mark.parametrize(("value", "result"), [("2 + 3", 5), ("9 - 12", -3), ("4 * 5 * 2", 40), ("1 + 2 * 3 - 4", 3)])
def test_arithmetic_knows_its_answer(value, result):
    check = Check(kind="chain", value=value)
    assert check.result() == result
    assert check.holds(check.answer())
    assert check.answer("zh") == f"{value} = {result}。"


def test_other_checks_know_no_answer():
    assert Check(kind="lower_case").result() is None
    assert Check(kind="lower_case").answer() == ""


@pytest.mark.parametrize("kind", list(SAID))
def test_cases_are_made_by_seed_and_get_harder(kind):
    words = ("a", "b", "c", "d", "e")
    one, same = (make(kind, 2, random.Random(7), words, ("End.",)) for _ in range(2))
    assert one == same
    assert one.kind == kind
    low, high = (sum(len(str(make(kind, level, random.Random(s), words, ("End.",)).value)) for s in range(40)) for level in (0, 4))
    if kind == "words_at_most":
        values = [make(kind, level, random.Random(0), words, ()).value for level in (0, 2, 9)]
        assert values[0] > values[1] > values[2] == 6
    elif kind not in ("lower_case", "ends_with"):
        assert high >= low
    assert parsed(one.model_dump(mode="json"), "here") == one


def test_keys_that_can_be_asked_for_are_words():
    assert all(k.isalpha() for k in KEYS)


def test_a_check_that_is_none_is_named():
    with pytest.raises(DataError, match="f:3: check: kind"):
        parsed({"kind": "rhymes"}, "f:3")
