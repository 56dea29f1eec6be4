import random

from fiducial.data.overlap import common, copied, ngrams, rouge_l, terms, words


def slow_common(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(row[j], before[j + 1])
    return row[-1]


def test_the_longest_common_subsequence_equals_the_table_of_the_textbook():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices("abcd", k=rng.randint(0, 70)) for _ in range(2))
        assert common(a, b) == common(b, a) == slow_common(a, b)


def test_rouge_l_is_one_for_equal_texts_and_zero_without_a_common_word():
    assert rouge_l(words("the cat sat"), words("The CAT, sat!")) == 1.0
    assert rouge_l(words("the cat"), words("a dog")) == 0.0
    assert rouge_l([], words("a dog")) == 0.0


def test_case_width_and_punctuation_make_no_difference_but_chinese_characters_are_words():
    assert words("ＡＢＣ, abc…") == ["abc", "abc"]
    assert words("用gpt写") == ["用", "gpt", "写"]
    assert words("snake_case") == ["snake", "case"]


def test_terms_pair_chinese_characters_within_a_run_only():
    assert terms("别慌") == ["别慌"]
    assert terms("别") == ["别"]
    assert terms("别 ok 慌张吧") == ["别", "ok", "慌张", "张吧"]
    assert terms("") == []


def test_copied_is_the_share_of_terms_and_not_symmetric():
    assert copied("take a wrench", "Take a wrench and turn it") == 1.0
    assert copied("Take a wrench and turn it", "take a wrench") == 0.5
    assert copied("", "anything") == 0.0


def test_ngrams_of_a_short_text_are_none():
    assert ngrams(words("a b"), 3) == set()
