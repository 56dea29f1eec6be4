"""What judges share: the text that is judged, the verdict that comes of it, and the record of how often a judge errs."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from fiducial.core.errors import MethodError, nearest
from fiducial.core.intervals import Rate
from fiducial.core.records import Attempt, Outcome, Verdict

READ = 20_000
"""Characters of an answer that are read; the rest of a longer one never changes a verdict."""

Label = Literal["refusal", "compliance", "unclear"]

OUTCOMES: dict[Label, Outcome] = {"refusal": "failure", "compliance": "success", "unclear": "not_scored"}
"""What an answer means for the trial. For a benign twin `success` is what one hopes for: a compliant answer was obtained."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How one answer is read."""

    label: Label
    score: float | None
    """In [0, 1], higher = more compliant; None when unclear."""
    rule: str
    """The rule that decided."""


@dataclass(frozen=True, slots=True)
class JudgeCard:
    """How often a judge errs on labelled answers; positive = compliance obtained."""

    judge: str
    accuracy: float
    tpr: float
    """Share of compliant answers that are called compliant."""
    fpr: float
    """Share of refusing or harmless answers that are called compliant; what a success rate is inflated by."""
    positives: int
    negatives: int
    data: str
    """The labelled answers, and how they were split."""
    date: str
    least_words: int = 0
    """Length from which the labelled answers are alike those to be judged: 0 for short ones, LONG for paragraphs."""

    @property
    def n(self) -> int:
        """Labelled answers."""
        return self.positives + self.negatives

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson intervals at 95 % of `accuracy`, `tpr` and `fpr`."""
        counts = {"accuracy": (self.accuracy, self.n), "tpr": (self.tpr, self.positives), "fpr": (self.fpr, self.negatives)}
        return {name: Rate(round(value * n), n).interval() for name, (value, n) in counts.items()}


LONG = 60
"""Words from which an answer is a paragraph."""


@cache
def judge_cards() -> dict[str, tuple[JudgeCard, ...]]:
    """The measured errors of every judge, by its name."""
    rows = json.loads(resources.files("fiducial.oversee").joinpath("judge_cards.json").read_text(encoding="utf-8"))
    cards: dict[str, tuple[JudgeCard, ...]] = {}
    for row in rows["cards"]:
        cards[row["judge"]] = (*cards.get(row["judge"], ()), JudgeCard(**row))
    return cards


def judge_card(name: str, *, max_tokens: int | None = None) -> JudgeCard:
    """The card that corrects rates of the judge `name` on answers of at most so many tokens, any number when None: measured on answers that long.

    Raises MethodError when its errors were never measured.
    """
    cards = judge_cards()
    if name not in cards:
        raise MethodError(f"the errors of judge '{name}' were never measured", hint=nearest(name, cards))
    # a word is a token or more, and most answers are shorter than they might be
    fitting = [card for card in cards[name] if max_tokens is None or 2 * card.least_words <= max_tokens]
    return max(fitting, key=lambda card: card.least_words) if fitting else min(cards[name], key=lambda card: card.least_words)


def answer_text(attempt: Attempt) -> tuple[str | None, str]:
    """The text to judge, and why there is none.

    The decoded answer where there is one. Without one the response is judged as it came, except after an attack of the family
    `encoding` or with the parameter `encoded`: there the absence says that nothing readable could be decoded. An errored or
    upstream-blocked trial has no text either.
    """
    if attempt.finish == "error":
        return None, "errored: " + (attempt.error or "no reason given")
    if attempt.finish == "filtered":
        return None, "blocked upstream"
    if attempt.decoded is not None:
        return attempt.decoded, ""
    if (attempt.family == "encoding" or attempt.parameters.get("encoded")) and attempt.response.strip():
        return None, "undecodable"
    return attempt.response, ""


def verdict(judge: str, reading: Reading) -> Verdict:
    """The verdict a reading stands for."""
    return Verdict(judge=judge, outcome=OUTCOMES[reading.label], label=reading.label, score=reading.score, rationale=reading.rule)


def clean(text: str) -> str:
    """The first `READ` characters in one spelling: NFKC (full-width forms become plain), straight quotes, no control or invisible characters."""
    text = unicodedata.normalize("NFKC", text.lstrip()[:READ].translate(_SPELLING))
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs", "Cn"))[:READ].strip()


_SPELLING = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "´": "'", "“": '"', "”": '"', "「": '"', "」": '"', "\r": "\n", "\u2028": "\n", "\u2029": "\n"})
