"""Preferences from AI feedback: sampled answers compared under principles, as soft labels (the reinforcement stage of constitutional AI).

What it does: samples answers to what was asked, shows each two of them to a feedback model as (A) and (B) under a drawn principle, in both
              orders, and makes the probability of its choice the soft label of the pair.
Use it when:  a model that judges is at hand and people's labels are not. Train with align/dpo, or a reward model first.
Formula:      p = softmax of log p("(A)"), log p("(B)"), mean over both orders; after a chain of thought clamped to [0.4, 0.6]; then mean over
              principles. More than two answers to a prompt give one group for each two of them, and these weigh 1 together.
Defaults:     2 answers, 1 principle per pair, no chain of thought; temperature 0.7 (paper: 1, at which small models write noise).
Limits:       a small model's choice is mostly its bias for a letter: look at how often the orders agree. A feedback model that gives no
              probabilities answers in text, and labels are hard then; the note of each group says so. A comparison of which it chooses in one
              order alone is left out: it would keep the bias that the other order is asked for.
Source:       Bai et al. 2022, arXiv:2212.08073, section 4; clamp in section 4.1.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp
from statistics import fmean
from typing import TYPE_CHECKING, Any, final

from fiducial.align.asking import ask, asked, distinct, helper, portions, texts, transcript
from fiducial.core.records import Attempt, Completion, Conversation, Group, Message, user
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.data.constitution import Principle, constitution
from fiducial.data.languages import tongue
from fiducial.models.base import WhiteBox

if TYPE_CHECKING:
    from fiducial.models.base import Model

log = logging.getLogger(__name__)

CLAMP = (0.4, 0.6)
"""Bounds of a probability that follows a chain of thought, which alone would be near 0 or 1."""
AGREE = 2 / 3
"""Share of comparisons in which both orders should name the same answer; below it a warning says so."""
ASK = {
    "en": "Here is a conversation and two possible answers to its last message.\n\n{talk}\n\n(A) {a}\n\n(B) {b}\n\n{question}\n{how}",
    "zh": "下面是一段对话，以及对最后一条消息的两个可能回答。\n\n{talk}\n\n(A) {a}\n\n(B) {b}\n\n{question}\n{how}",
}
CHOOSE = {"en": "Reply with (A) or (B) only.", "zh": "只回复 (A) 或 (B)。"}
THINK = {
    "en": "Think it over step by step in a few sentences, and end with: The better answer is (A), or: The better answer is (B).",
    "zh": "请用几句话逐步思考，最后写出：更好的回答是 (A)，或者：更好的回答是 (B)。",
}
SO = {"en": "The better answer is ", "zh": "更好的回答是 "}


@final
@dataclass(frozen=True, slots=True)
class AIPreferences(Maker):
    """Soft labels from comparisons under principles."""

    principles: str = ""
    """A constitution file (YAML); the shipped one by default."""
    feedback: str = ""
    """Model that compares, by name; the model itself by default."""
    answers: int = 2
    """Answers sampled per prompt, at least 2; equal ones count once."""
    draws: int = 1
    """Principles per pair of answers, drawn by seed."""
    chain_of_thought: bool = False
    """Whether the feedback model thinks before it chooses."""
    max_tokens: int = 160
    """Longest answer or thought, in tokens."""
    temperature: float = 0.7
    """Of the answers; thoughts and choices are the likeliest."""

    def __post_init__(self) -> None:
        if self.answers < 2 or self.draws < 1 or self.max_tokens < 1 or self.temperature <= 0:
            raise ValueError(
                "answers must be at least 2, draws and max_tokens at least 1, temperature above 0; "
                f"got {self.answers}, {self.draws}, {self.max_tokens}, {self.temperature}"
            )

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """For each scored attempt, one group per two different answers with a choice between them that can be read in both orders."""
        law = constitution(self.principles or None)
        groups: list[Group] = []
        without = unread = 0
        scored = [a for a in attempts if a.scored]
        with helper(self.feedback, model) as feedback:
            for some in portions(scored):
                sampled = ask(model, [asked(a) for a in some], max_tokens=self.max_tokens, temperature=self.temperature, k=self.answers, seed=seed)
                comparisons = [c for a, row in zip(some, sampled, strict=True) for c in self._pairs(a, distinct(row), law, seed)]
                self._compare(comparisons, feedback)
                unread += sum(c.before is None for c in comparisons)
                for attempt in some:
                    found = self._groups(attempt, [c for c in comparisons if c.attempt is attempt], feedback)
                    without += not found
                    for group in found:
                        groups.append(group)
                        sink(group)
        if without:
            log.warning("%d of %d prompts gave no two different answers with a choice between them that can be read in both orders", without, len(scored))
        _remark(groups, unread)
        return groups

    def _pairs(self, attempt: Attempt, answers: list[Completion], law: list[Principle], seed: int) -> list[_Comparison]:
        """Every two answers under every drawn principle."""
        rng = random.Random(f"{seed}:{attempt.id}")
        drawn = [rng.sample(law, min(self.draws, len(law))) for _ in combinations(answers, 2)]
        pairs = combinations(range(len(answers)), 2)
        return [_Comparison(attempt, (i, j), (answers[i], answers[j]), p) for (i, j), some in zip(pairs, drawn, strict=True) for p in some]

    def _compare(self, comparisons: list[_Comparison], feedback: Model) -> None:
        """Fills in `orders`: the probability that the first answer is better, asked as (A) and asked as (B)."""
        requests = [c.request(swapped=swapped, think=self.chain_of_thought) for c in comparisons for swapped in (False, True)]
        thoughts = texts(feedback, requests, max_tokens=self.max_tokens) if self.chain_of_thought or not isinstance(feedback, WhiteBox) else []
        chosen: list[float | None]
        if isinstance(feedback, WhiteBox):
            languages = [c.language for c in comparisons for _ in range(2)]
            chosen = _probabilities(feedback, [_so(r, t, z) for r, t, z in zip(requests, thoughts, languages, strict=True)] if thoughts else requests)
        else:
            chosen = [{"A": 1.0, "B": 0.0}.get(letter(t)) for t in thoughts]
        for number, comparison in enumerate(comparisons):
            first, second = chosen[2 * number : 2 * number + 2]
            comparison.orders = (first, None if second is None else 1 - second)

    def _groups(self, attempt: Attempt, comparisons: list[_Comparison], feedback: Model) -> list[Group]:
        """One group per pair of answers, so that what is learnt of a pair is what was judged of it, whatever became of the others."""
        judged: dict[tuple[int, int], list[_Comparison]] = {}
        for comparison in comparisons:
            if comparison.before is not None:
                judged.setdefault(comparison.pair, []).append(comparison)
        prompt = attempt.prompt.model_copy(update={"messages": asked(attempt)})
        kind = "soft" if isinstance(feedback, WhiteBox) else "hard"
        note = f"{self.name}: {kind} labels of {feedback.uri}{' after a chain of thought' if self.chain_of_thought else ''}"
        groups = []
        for some in judged.values():
            rows = [c.row(clamp=self.chain_of_thought) for c in some]
            p = fmean(row["after"] for row in rows)
            said = {"labels": kind, "chain_of_thought": self.chain_of_thought, "comparisons": rows}
            weight = 1 / len(judged)
            groups.append(Group(prompt=prompt, completions=some[0].answers, targets=(p, 1 - p), weight=weight, annotator=note, provenance=said))
        return groups


@dataclass(slots=True)
class _Comparison:
    """Two answers of one prompt under one principle."""

    attempt: Attempt
    pair: tuple[int, int]
    answers: tuple[Completion, Completion]
    principle: Principle
    orders: tuple[float | None, float | None] = (None, None)
    """Probability that the first answer is the better one, by the order in which they were shown; None where no choice could be read."""

    @property
    def language(self) -> str:
        return tongue(self.attempt.prompt.language)

    @property
    def before(self) -> float | None:
        """The mean over both orders; None unless both could be read."""
        read = [p for p in self.orders if p is not None]
        return fmean(read) if len(read) == len(self.orders) else None

    def request(self, *, swapped: bool, think: bool) -> Conversation:
        """What the feedback model is asked."""
        a, b = (c.text for c in (self.answers[::-1] if swapped else self.answers))
        question = self.principle.wording("compare", self.attempt.prompt.language)
        talk = transcript(asked(self.attempt), self.language)
        values = {"talk": talk, "a": a, "b": b, "question": question, "how": (THINK if think else CHOOSE)[self.language]}
        return user(ASK[self.language].format(**values))

    def row(self, *, clamp: bool) -> dict[str, Any]:
        """What is recorded of it."""
        before = self.before
        assert before is not None
        after = min(max(before, CLAMP[0]), CLAMP[1]) if clamp else before
        agree = len({p > 0.5 for p in self.orders if p is not None}) == 1
        return {"pair": list(self.pair), "principle": self.principle.name, "orders": list(self.orders), "agree": agree, "before": before, "after": after}


def letter(text: str) -> str:
    """The letter that an answer in words chooses; empty where it names none, or both without a conclusion.

    >>> letter("(B)"), letter("(A) is vague. The better answer is (B), not (A)."), letter("(A) and (B) are alike."), letter("A")
    ('B', 'B', '', 'A')
    """
    ends = [(text.rfind(phrase.strip()), len(phrase.strip())) for phrase in SO.values()]
    start, length = max(ends)
    found = re.findall(r"[(（]([AB])[)）]", text[start + length :] if start >= 0 else text)
    if found and (start >= 0 or len(set(found)) == 1):
        return str(found[0])
    alone = re.fullmatch(r"\W*([AB])\W*", text)
    return alone[1] if alone else ""


def _so(request: Conversation, thought: str, language: str) -> Conversation:
    """The request with the thought and the beginning of its conclusion; one that the model wrote itself is taken away again."""
    thought = thought.partition(SO[language].strip())[0].rstrip()
    return (*request, Message(role="assistant", content=f"{thought}\n\n{SO[language]}" if thought else SO[language]))


def _probabilities(model: WhiteBox, conversations: Sequence[Conversation]) -> list[float | None]:
    """Probability of "(A)" against "(B)" after each conversation; None for one that the model cannot read whole."""
    from fiducial.models.forest import Paths

    asked = [[model.encode(c, option, end=False) for option in ("(A)", "(B)")] for c in conversations]
    read = [i for i, pair in enumerate(asked) if all(len(ids) <= model.context + 1 for ids, _ in pair)]
    found: list[float | None] = [None] * len(asked)
    if not read:
        return found
    logp = model.score(Paths.of([pair for i in read for pair in asked[i]], group=[i for i in read for _ in range(2)])).path_logp.tolist()
    for i, a, b in zip(read, logp[::2], logp[1::2], strict=True):
        found[i] = 1 / (1 + exp(min(b - a, 700.0)))
    return found


def _remark(groups: Sequence[Group], unread: int) -> None:
    """Warnings about comparisons that were left out and what the labels of the others are worth."""
    rows = [row for g in groups for row in g.provenance["comparisons"]]
    agree = sum(row["agree"] for row in rows)
    if unread:
        log.warning("%d of %d comparisons are left out: no choice could be read in both orders", unread, unread + len(rows))
    if rows and agree < AGREE * len(rows):
        log.warning("only in %d of %d comparisons do both orders prefer the same answer: these labels say little", agree, len(rows))
