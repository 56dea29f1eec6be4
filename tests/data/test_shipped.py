"""The data that comes along: enough of it, what the cards say of it, and nothing in two splits."""

import re
from collections import Counter, defaultdict
from math import ceil

import pytest

from fiducial.data.constitution import constitution
from fiducial.data.load import SHIPPED, capability, near_twins, ordinary, shipped_goals
from fiducial.data.overlap import rouge_l, words
from fiducial.data.rows import read_rows
from fiducial.data.split import SPLITS, goal_text, normalised, split_of

ALIKE = 0.8
"""ROUGE-L from which on two texts are nearly the same."""


@pytest.fixture(scope="module")
def divided():
    """Each text once, with its split."""
    prompts = [*(prompt for pair in shipped_goals() for prompt in pair), *near_twins(), *ordinary()]
    return [(p.text, split_of(goal_text(p))) for p in prompts]


def said(name):
    """The card of a file, its line breaks as spaces."""
    return " ".join((SHIPPED / f"{name}.card.md").read_text(encoding="utf-8").split())


def table(goals):
    """The rows of a card's table of splits."""
    counts = Counter((g.language, split_of(g.text)) for g in goals)
    for name, languages in (("en", ["en"]), ("zh", ["zh"]), ("all", ["en", "zh"])):
        cells = [sum(counts[language, part] for language in languages) for part in SPLITS]
        yield f"| {name} | {' | '.join(map(str, [*cells, sum(cells)]))} |"


def near(pairs, least):
    """Pairs of texts of different splits whose ROUGE-L is `least` or more; none is missed.

    Texts of a and b words reach 0.8 with 0.4 (a + b) words in common, hence b >= 2/3 a and at least 2/3 a words in common. Then, in one
    order of all words, the first a - 2/3 a + 1 of one hold one of the first of the other; the rarest come first, so that few others do.
    """
    share = least / (2 - least)
    listed = [words(text) for text, _ in pairs]
    often = Counter(word for found in listed for word in set(found))
    holding = defaultdict(list)
    for i, found in enumerate(listed):
        first = set(sorted(found, key=lambda w: (often[w], w))[: len(found) - ceil(share * len(found)) + 1])
        for j in sorted({j for word in first for j in holding[word]}):
            if pairs[i][1] != pairs[j][1] and rouge_l(found, listed[j]) >= least:
                yield pairs[j], pairs[i]
        for word in first:
            holding[word].append(i)


def test_there_are_enough_goals_requests_questions_and_principles():
    goals = [goal for goal, _ in shipped_goals()]
    assert len(goals) >= 240
    assert len({g.category for g in goals}) >= 12
    assert sum(g.language == "zh" for g in goals) >= 60
    assert len(ordinary()) >= 120
    assert len(capability()) >= 150
    assert len(constitution()) >= 16


def test_a_twin_shares_a_telling_stem_or_character_with_its_goal():
    pairs = shipped_goals()
    often = Counter(word for goal, _ in pairs for word in set(words(goal.text)))

    def telling(prompt):
        found = {word for word in words(prompt.text) if often[word] <= len(pairs) / 20}
        return found if prompt.language == "zh" else {word[:4] for word in found if len(word) >= 4}

    assert [(goal.text, twin.text) for goal, twin in pairs if not telling(goal) & telling(twin)] == []


def test_cards_count_what_is_in_the_files():
    goals, near_goals = [goal for goal, _ in shipped_goals()], [goal.twin for goal in near_twins()]
    by_text = {g.text: g for g in goals}
    for name, found in (("goals", goals), ("near_twins", [by_text[text] for text in near_goals])):
        en, zh = (Counter(g.category for g in found if g.language == language) for language in ("en", "zh"))
        assert f"{len(found)} pairs: {en.total()} in English (`en`), {zh.total()} in Chinese (`zh`)" in said(name)
        assert [row for row in table(found) if row not in said(name)] == []
    en, zh = (Counter(g.category for g in goals if g.language == language) for language in ("en", "zh"))
    assert f"in {len(en)} categories (English, Chinese): {', '.join(f'`{c}` ({en[c]}, {zh[c]})' for c in sorted(en))}." in said("goals")


def test_the_other_cards_count_too():
    asked, questions, english = ordinary(), capability(), [g for g, _ in shipped_goals() if g.language == "en"]
    for name, found, what in (("ordinary", asked, "requests"), ("capability", questions, "questions")):
        en = sum(p.language == "en" for p in found)
        assert f"{len(found)} {what}: {en} in English, {len(found) - en} in Chinese. {len({p.category for p in found})} categories" in said(name)
        assert {p.category for p in found} <= set(re.findall(r"`(\w+)`", said(name)))
    assert set(Counter(p.category for p in asked).values()) == {49, 50}
    assert set(Counter((p.category, p.language) for p in questions).values()) == {25, 5}
    assert set(Counter(p.gold for p in questions).values()) == {60}
    assert f"{len(constitution())} principles, each with 4 texts in 2 languages, {8 * len(constitution())} texts" in said("constitution")
    assert all(f"`{p.name}`" in said("constitution") for p in constitution())
    parts, rows = Counter(split_of(g.text) for g in english), len(read_rows(SHIPPED / "translations.jsonl"))
    ofs = ", ".join(f"{2 * parts[part]} {part}" for part in SPLITS)
    assert f"{rows} translations: {len(english)} of goals and {rows - len(english)} of twins, each text once. By split of the goal: {ofs}." in said(
        "translations"
    )


def test_no_text_is_in_two_splits(divided):
    places = defaultdict(set)
    for text, part in divided:
        places[normalised(text)].add(part)
    assert [text for text, parts in places.items() if len(parts) > 1] == []


def test_no_text_is_nearly_one_of_another_split(divided):
    assert list(near(divided, ALIKE)) == []


def test_near_texts_are_found():
    a, b = ("share some hacks for peeling garlic", "repair"), ("share your best hacks for peeling garlic", "held-out")
    other = ("peel an orange", "held-out")
    assert rouge_l(words(a[0]), words(b[0])) == pytest.approx(10 / 13)  # 5 in common of 6 and 7 words
    assert list(near([a, other, b], 10 / 13)) == [(a, b)]
    assert list(near([a, other, b], 0.8)) == []
    assert list(near([a, (b[0], "repair")], 10 / 13)) == []
