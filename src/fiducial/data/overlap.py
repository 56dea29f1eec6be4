"""How much two texts share: words, n-grams, the longest common subsequence.

Words are compared without case and width; a Chinese character is a word of its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

HAN = "\\u3400-\\u9fff\\uf900-\\ufaff"
_WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+(?:['’][^\W_{HAN}]+)*")
_HAN = re.compile(rf"[{HAN}]")
_UNSPACED = rf"{HAN}\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Chinese, Japanese, Thai, Lao, Burmese and Khmer letters."""
_UNIT = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of `text` in order.

    >>> words("Don't PANIC, 42! 别慌")
    ["don't", 'panic', '42', '别', '慌']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def units(text: str) -> list[str]:
    """What the length of a text is counted in: words as white space divides them, and each letter of scripts that are written without it.

    >>> units("Don't PANIC, 42! 别慌，好")
    ["Don't", 'PANIC,', '42!', '别', '慌', '，', '好']
    """
    return _UNIT.findall(text)


def terms(text: str) -> list[str]:
    """The words of `text`, but Chinese as neighbouring pairs of characters: single ones are shared by any two texts.

    >>> terms("别慌张 ok")
    ['别慌', '慌张', 'ok']
    """
    found, out = words(text), []
    for i, word in enumerate(found):
        if not _HAN.match(word):
            out.append(word)
        elif i + 1 < len(found) and _HAN.match(found[i + 1]):
            out.append(word + found[i + 1])
        elif i == 0 or not _HAN.match(found[i - 1]):
            out.append(word)
    return out


def ngrams(found: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """The distinct runs of `n` words.

    >>> sorted(ngrams(["a", "b", "a", "b"], 2))
    [('a', 'b'), ('b', 'a')]
    """
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def repetition(text: str, n: int = 4) -> float:
    """Share of the runs of `n` words that occurred before in the same text; 0 where there is none.

    >>> round(repetition("a b c d a b c d"), 3)
    0.2
    """
    found = words(text)
    runs = len(found) - n + 1
    return 1 - len(ngrams(found, n)) / runs if runs > 0 else 0.0


def copied(text: str, source: str) -> float:
    """Share of the terms of `text` that occur in `source`; 0 for a text without any.

    >>> copied("take a wrench now", "Take a wrench")
    0.75
    """
    said, known = terms(text), set(terms(source))
    return sum(t in known for t in said) / len(said) if said else 0.0


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by Hyyrö's bit-parallel recurrence (2004): one addition per word of `b`.

    >>> common(["a", "b", "c", "d"], ["b", "x", "d", "a"])
    2
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        here = row & places.get(word, 0)
        row = ((row + here) | (row - here)) & full
    return len(a) - row.bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L of two lists of words: the F1 of the longest common subsequence, in [0, 1]. Source: Lin 2004.

    >>> rouge_l(["a", "b", "c"], ["a", "c"])
    0.8
    """
    return 2 * common(a, b) / (len(a) + len(b)) if a and b else 0.0
