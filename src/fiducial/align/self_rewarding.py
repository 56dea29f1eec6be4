"""Self-rewarding: preference pairs from answers that the model samples and grades itself, for iterated DPO.

What it does: samples several answers to what was asked, has a judge (by default the model itself) grade each by an additive rubric of five
              points in several draws, and pairs the best with the worst.
Use it when:  prompts are many and labels few, and the judge can grade. Train with align/dpo, then make new pairs with the trained model;
              its reference is the model that each round began with.
Formula:      reward = mean of the readable grades, 0 to 5; with `expected`, sum over n of n p(n), p the judge's probabilities of 0 to 5
              after "Score:". The pair is the widest gap among two answers whose lengths differ by at most `length_ratio`.
Defaults:     4 answers at temperature 0.7 and top-p 0.9, 3 grades each at the same temperature, sampled.
Limits:       a judge that is trained with the model drifts with it: name a fixed `judge` unless that is the experiment. Small models write hardly
              any grade that can be read; with `expected` they always give one, nearly at random. Harmful goals are graded by another rubric,
              which prefers a good refusal.
Source:       Yuan et al. 2024, arXiv:2401.10020, section 2; expected grades: Liu et al. 2023, arXiv:2303.16634, eq. 1; the rubrics are our own, in
              self_rewarding.json.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, final

from fiducial.align.asking import ask, asked, counted, distinct, helper, portions, transcript
from fiducial.core.errors import MethodError
from fiducial.core.records import Attempt, Completion, Conversation, Group, Message, user
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.data.languages import tongue
from fiducial.models.base import WhiteBox

if TYPE_CHECKING:
    from fiducial.models.base import Model

log = logging.getLogger(__name__)

TOP_P = 0.9
POINTS = 5
GRADES = range(POINTS + 1)
SCORE = {"en": "Score:", "zh": "得分："}
"""How a reply begins from which the grade is read."""


@final
@dataclass(frozen=True, slots=True)
class SelfRewarding(Maker):
    """Best against worst of several graded answers."""

    judge: str = ""
    """Model that grades, by name; the model itself by default."""
    answers: int = 4
    """Answers sampled per prompt, at least 2; equal ones count once."""
    draws: int = 3
    """Grades drawn per answer; their mean is its reward."""
    grades: Literal["sampled", "expected"] = "sampled"
    """Grades that the judge writes after its reasons, or the mean of its probabilities of the grades, without reasons; that needs its weights."""
    length_ratio: float = 1.5
    """The longer answer of a pair has at most this many times the characters of the other."""
    max_tokens: int = 160
    """Longest answer or grading, in tokens."""
    temperature: float = 0.7
    """Of answers and grades."""

    def __post_init__(self) -> None:
        if self.grades not in ("sampled", "expected"):
            raise ValueError(f"grades are sampled or expected, not '{self.grades}'")
        if self.answers < 2 or self.draws < 1 or self.length_ratio < 1 or self.max_tokens < 1 or self.temperature <= 0:
            raise ValueError(
                "answers must be at least 2, draws, length_ratio and max_tokens at least 1, temperature above 0; "
                f"got {self.answers}, {self.draws}, {self.length_ratio}, {self.max_tokens}, {self.temperature}"
            )

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """At most one pair per scored attempt, the better answer first. Prompts whose answers tie give none."""
        scored = [a for a in attempts if a.scored]
        groups: list[Group] = []
        without: list[str] = []
        how: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": TOP_P, "seed": seed}
        with helper(self.judge, model) as judge:
            for some in portions(scored):
                sampled = [distinct(row) for row in ask(model, [asked(a) for a in some], k=self.answers, **how)]
                answers = [(a, c.text) for a, row in zip(some, sampled, strict=True) for c in row]
                grades = iter(self._grades(judge, answers, how))
                for attempt, row in zip(some, sampled, strict=True):
                    group = self._pair(attempt, row, [next(grades) for _ in row], judge)
                    if isinstance(group, Group):
                        groups.append(group)
                        sink(group)
                    else:
                        without.append(group)
        if without:
            log.warning("%d of %d prompts gave no pair: %s", len(without), len(scored), counted(without))
        return groups

    def _grades(self, judge: Model, answers: Sequence[tuple[Attempt, str]], how: dict[str, Any]) -> list[list[float | None]]:
        """The grades of each answer, None where one cannot be read. Raises MethodError for expected grades of a model whose weights are elsewhere."""
        requests = [grading(attempt, text) for attempt, text in answers]
        if self.grades == "sampled":
            return [[grade(c.text) for c in row] for row in ask(judge, requests, k=self.draws, **how)]
        if not isinstance(judge, WhiteBox):
            raise MethodError(f"expected grades are read from probabilities, which {judge.uri} does not give", hint="take sampled ones, or another judge")
        return [[value] for value in expected(judge, requests, [tongue(attempt.prompt.language) for attempt, _ in answers])]

    def _pair(self, attempt: Attempt, answers: list[Completion], grades: list[list[float | None]], judge: Model) -> Group | str:
        """The pair, or why there is none."""
        read = [[g for g in some if g is not None] for some in grades]
        rewards = [fmean(some) if some else None for some in read]
        chosen = widest([c.text for c in answers], rewards, self.length_ratio)
        if chosen is None:
            known = {r for r in rewards if r is not None}
            return "no two answers with a readable grade" if sum(map(bool, read)) < 2 else "a tie" if len(known) == 1 else "too different in length"
        return Group(
            prompt=attempt.prompt.model_copy(update={"messages": asked(attempt)}),
            completions=tuple(answers[i] for i in chosen),
            rewards=tuple(rewards[i] for i in chosen),
            targets=(1.0, 0.0),
            annotator=f"{self.name}: graded by {judge.uri}",
            provenance={"grades": [grades[i] for i in chosen], "rewards_of_all": rewards},
        )


def widest(texts: Sequence[str], rewards: Sequence[float | None], ratio: float) -> tuple[int, int] | None:
    """(better, worse) with the widest gap in reward among answers of similar length; the first of several. None where all tie.

    >>> widest(["long answer", "answer", "other"], [5.0, 3.0, 1.0], 1.5)
    (1, 2)
    """
    gaps = []
    for i, j in permutations(range(len(texts)), 2):
        better, worse = rewards[i], rewards[j]
        longer, shorter = max(len(texts[i]), len(texts[j])), min(len(texts[i]), len(texts[j]))
        if better is not None and worse is not None and better > worse and longer <= ratio * shorter:
            gaps.append((better - worse, -i, -j))
    return (-max(gaps)[1], -max(gaps)[2]) if gaps else None


def grade(text: str) -> int | None:
    """The sum that a grading ends with, 0 to 5; None where there is none.

    >>> grade("Point 1 and 2.\\nScore: 2"), grade("得分：5/5"), grade("Score: 12"), grade("good")
    (2, 5, None, None)
    """
    found = re.findall(r"(?:Score|得分)\W{0,4}(\d+)(?!\d|\.\d)", text, re.IGNORECASE)
    return int(found[-1]) if found and int(found[-1]) <= POINTS else None


def expected(judge: WhiteBox, requests: Sequence[Conversation], languages: Sequence[str]) -> list[float]:
    """The mean grade, 0 to 5, of the judge's probabilities of each grade as the beginning of its reply."""
    from fiducial.models.forest import Paths

    if not requests:
        return []
    begun = [(*r, Message(role="assistant", content=SCORE[language])) for r, language in zip(requests, languages, strict=True)]
    # the space belongs to the digit in most vocabularies
    pairs = [judge.encode(c, f"{'' if language == 'zh' else ' '}{n}", end=False) for c, language in zip(begun, languages, strict=True) for n in GRADES]
    logp = judge.score(Paths.of(pairs, group=[i // len(GRADES) for i in range(len(pairs))])).path_logp
    shares: list[list[float]] = logp.reshape(-1, len(GRADES)).softmax(1).tolist()
    return [sum(n * p for n, p in zip(GRADES, row, strict=True)) for row in shares]


def grading(attempt: Attempt, answer: str) -> Conversation:
    """What the judge is asked about one answer."""
    texts = _rubrics()[tongue(attempt.prompt.language)]
    rubric = texts["refuse" if attempt.prompt.expected == "refuse" else "answer"]
    return user(texts["ask"].format(rubric=rubric, talk=transcript(asked(attempt), attempt.prompt.language), answer=answer))


@cache
def _rubrics() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found
