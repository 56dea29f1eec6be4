"""Requirements on an answer that a program can check: length, format, keywords, arithmetic. And requests made with them.

{"kind": "words_at_most", "value": 20}        is said as "Use at most 20 words." and holds for an answer of 1 to 20 words
"""

from __future__ import annotations

import json
import random
import re
from typing import Any, Literal

from pydantic import ValidationError

from fiducial.core.errors import DataError
from fiducial.core.records import Record
from fiducial.data.overlap import words

Kind = Literal["words_at_most", "words_at_least", "sentences", "items", "json_keys", "lower_case", "contains", "avoids", "ends_with", "sum", "product", "chain"]

SAID: dict[str, dict[str, str]] = {
    "words_at_most": {"en": "Use at most {value} words.", "zh": "不要超过{value}个字。"},
    "words_at_least": {"en": "Use at least {value} words.", "zh": "至少写{value}个字。"},
    "sentences": {"en": "Use exactly {value} sentence(s).", "zh": "正好写{value}句话。"},
    "items": {
        "en": "Give a list of exactly {value} items, each on a line of its own that begins with a hyphen, and nothing else.",
        "zh": "列出正好{value}项，每项单独一行并以连字符“-”开头，不要写别的。",
    },
    "json_keys": {
        "en": "Reply with one JSON object whose keys are exactly {value}, and nothing else.",
        "zh": "只回复一个 JSON 对象，它的键正好是{value}，不要写别的。",
    },
    "lower_case": {"en": "Write everything in lower case.", "zh": "所用英文字母一律小写。"},
    "contains": {"en": "Use each of these words: {value}.", "zh": "必须用到以下词语：{value}。"},
    "avoids": {"en": "Do not use any of these words: {value}.", "zh": "不得使用以下词语：{value}。"},
    "ends_with": {"en": "End with these very words: {value}", "zh": "必须以这句话结尾：{value}"},
    "sum": {"en": "What is {value}?", "zh": "{value} 等于多少？"},
    "product": {"en": "What is {value}?", "zh": "{value} 等于多少？"},
    "chain": {"en": "What is {value}?", "zh": "{value} 等于多少？"},
}
ARITHMETIC = frozenset({"sum", "product", "chain"})
"""Kinds that are a whole request; the others are added to one."""
KEYS = ("title", "author", "year", "place", "price", "reason", "summary", "language")


class Check(Record):
    """One requirement."""

    kind: Kind
    value: int | str | tuple[str, ...] = ""
    """A number, words, or for arithmetic the expression."""

    def said(self, language: str = "en") -> str:
        """The requirement as a request puts it, in English or Chinese."""
        zh = language.startswith("zh")
        value = ("、" if zh else ", ").join(self.value) if isinstance(self.value, tuple) else self.value
        return SAID[self.kind]["zh" if zh else "en"].format(value=value)

    def result(self) -> int | None:
        """What an arithmetic request comes to; None for the other kinds."""
        if self.kind not in ARITHMETIC:
            return None
        total = 0
        for sign, product in re.findall(r"([+-]?)\s*(\d+(?:\s*\*\s*\d+)*)", str(self.value)):
            term = 1
            for factor in product.split("*"):
                term *= int(factor)
            total += -term if sign == "-" else term
        return total

    def answer(self, language: str = "en") -> str:
        """A right answer, where the check alone knows one (arithmetic); else empty."""
        result = self.result()
        if result is None:
            return ""
        return f"{self.value} = {result}。" if language.startswith("zh") else f"{self.value} = {result}."

    def holds(self, text: str) -> bool:
        """Whether an answer keeps to it; an empty one never does."""
        return bool(text.strip()) and _holds(self, text.strip())


def _holds(check: Check, text: str) -> bool:
    value, found = check.value, words(text)
    match check.kind:
        case "words_at_most":
            return len(found) <= int(str(value))
        case "words_at_least":
            return len(found) >= int(str(value))
        case "sentences":
            return len([s for s in re.split(r"(?<=[.!?])\s+|[。！？]", text) if words(s)]) == value
        case "items":
            lines = [line for line in text.splitlines() if line.strip()]
            return len(lines) == value and all(line.lstrip().startswith("- ") or re.match(r"\s*-\S", line) for line in lines)
        case "json_keys":
            return isinstance(value, tuple) and _keys(text) == set(value)
        case "lower_case":
            return text == text.lower()
        case "contains":
            return all(_has(found, word) for word in value) if isinstance(value, tuple) else False
        case "avoids":
            return not any(_has(found, word) for word in value) if isinstance(value, tuple) else False
        case "ends_with":
            return words(text)[-len(words(str(value))) :] == words(str(value))
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == check.result()


def make(kind: Kind, level: int, rng: random.Random, vocabulary: tuple[str, ...], endings: tuple[str, ...]) -> Check:
    """A check of that kind, harder with each level from 0 on. `vocabulary` and `endings` are words and last sentences to draw from."""
    match kind:
        case "words_at_most":
            return Check(kind=kind, value=max(6, rng.randint(35, 45) - 9 * level))
        case "words_at_least":
            return Check(kind=kind, value=rng.randint(20, 30) + 12 * min(level, 3))
        case "sentences" | "items":
            return Check(kind=kind, value=1 + min(level, 6) + rng.randint(0, 2))
        case "json_keys":
            return Check(kind=kind, value=tuple(rng.sample(KEYS, min(2 + level, len(KEYS)))))
        case "contains" | "avoids":
            return Check(kind=kind, value=tuple(rng.sample(vocabulary, min(1 + level, len(vocabulary)))))
        case "ends_with":
            return Check(kind=kind, value=rng.choice(endings))
        case "lower_case":
            return Check(kind=kind)
    top = 10 ** (1 + min(level, 4))
    a, b, c = rng.randint(2, top), rng.randint(2, top), rng.randint(2, 9)
    expression = {"sum": f"{a} + {b}", "product": f"{a} * {c}", "chain": f"{a} + {b} * {c}"}[kind]
    return Check(kind=kind, value=expression)


def parsed(value: Any, where: str) -> Check:
    """The check in a row of data. Raises DataError."""
    try:
        return Check.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{where}: check: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint=f"kinds are {', '.join(SAID)}") from error


def _keys(text: str) -> set[str] | None:
    """The keys of the one JSON object that the text is, with or without a code fence; None when it is not one."""
    fence = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found = json.loads(fence[1] if fence else text)
    except (ValueError, RecursionError):
        return None
    return set(found) if isinstance(found, dict) else None


def _has(found: list[str], word: str) -> bool:
    """Whether the words hold `word`, which may be several."""
    wanted = words(word)
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))
