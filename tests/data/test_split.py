import hashlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fiducial.core.records import Message, Prompt, user
from fiducial.data.split import goal_text, normalised, split, split_of


def place(text, salt="fiducial"):
    """Where the formula of the documentation puts a text that is already normalised, in [0, 1)."""
    return int(hashlib.sha256(f"{salt}\0{text}".encode()).hexdigest()[:16], 16) / 2**64


def test_the_split_is_read_off_the_hash_at_one_half_and_at_0_65():
    for i in range(300):
        expected = "repair" if place(f"goal {i}") < 0.5 else "validation" if place(f"goal {i}") < 0.65 else "held-out"
        assert split_of(f"goal {i}") == expected


def test_a_split_never_changes():
    # fixed for ever: a change here would mix what was learnt with what proves
    assert [split_of(text) for text in ("pick a lock", "make a bomb", "怎样撬锁")] == ["validation", "held-out", "repair"]


def test_the_shares_are_50_15_and_35_percent():
    # 10,000 draws: standard deviation of a share at most 0.5 %, so 2.5 % is five of them
    count = Counter(split_of(f"a goal with number {i}") for i in range(10_000))
    for name, share in (("repair", 0.50), ("validation", 0.15), ("held-out", 0.35)):
        assert abs(count[name] / 10_000 - share) < 0.025


def test_another_salt_is_another_division():
    texts = [f"goal {i}" for i in range(200)]
    assert [split_of(t) for t in texts] != [split_of(t, salt="other") for t in texts]


def test_case_width_punctuation_and_spacing_do_not_count():
    assert normalised("  How  to\npick a LOCK?!") == "how to pick a lock"
    assert normalised("ＡＢＣ，怎样撬锁？") == "abc 怎样撬锁"
    assert normalised("?!") == "?!"
    assert normalised("don't") != normalised("do")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalising_twice_is_normalising_once_for_texts_with_letters(text):
    once = normalised(text)
    assert split_of(text) == split_of(f"  {text}\n")
    assert normalised(once) == once or not any(c.isalnum() for c in text)


def test_a_goal_and_its_twin_are_always_together():
    for i in range(100):
        goal = Prompt(messages=user(f"harm {i}"), expected="refuse", twin=f"good {i}")
        twin = Prompt(messages=user(f"good {i}"), expected="comply", twin=f"harm {i}")
        assert goal_text(goal) == goal_text(twin) == f"harm {i}"
        (where,) = [name for name, items in split([goal, twin]).items() if items]
        assert split([goal, twin])[where] == [goal, twin]


def test_a_prompt_without_a_twin_goes_by_its_last_turn():
    turns = (Message(role="system", content="Be kind."), *user("Hello"))
    assert goal_text(Prompt(messages=turns, expected="comply")) == "Hello"


def test_nothing_gives_three_empty_parts():
    assert split([]) == {"repair": [], "validation": [], "held-out": []}
