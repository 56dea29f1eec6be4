"""Constitutional revision: the model criticises and rewrites its own answers (the supervised stage of constitutional AI).

What it does: for each failing attempt, draws a principle, asks a critic what is wrong with the answer, asks for a revision, and repeats
              from the revision. The group prefers the last revision to the first answer.
Use it when:  the critic (by default the model itself) can criticise. A model of a few hundred million parameters cannot do so reliably:
              use align/failure_pairs there, or give a stronger critic.
Defaults:     2 rounds (paper: up to 4), the shipped constitution, principles drawn by seed, temperature 0.7.
Limits:       this trains on revisions as preferred answers; it is not the reinforcement stage. Critiques that repeat the answer and
              revisions that equal it are dropped, and counted in the annotator's note.
Source:       Bai et al. 2022, arXiv:2212.08073, section 3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from fiducial.core.records import Attempt, Completion, Conversation, Group, Message
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.data.load import Principle, constitution

if TYPE_CHECKING:
    from fiducial.models.base import Model

TOO_ALIKE = 0.8
"""Share of a critique's words that may come from the answer it criticises."""


@final
@dataclass(frozen=True, slots=True)
class ConstitutionalRevision(Maker):
    """Critique and revision under drawn principles."""

    principles: str = ""
    """A constitution file (YAML); the shipped one by default."""
    rounds: int = 2
    """Critique-and-revision rounds per answer, at least 1."""
    max_tokens: int = 160
    """Longest critique or revision, in tokens."""
    temperature: float = 0.7
    """Of critiques and revisions; 0 for the likeliest."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(f"rounds and max_tokens must be at least 1, temperature at least 0; got {self.rounds}, {self.max_tokens}, {self.temperature}")

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """One group per failing attempt whose revision is usable: (revision, first answer)."""
        law = constitution(self.principles or None)
        failing = [a for a in attempts if a.scored and a.failed]
        answers = [Completion(text=a.response, finish=a.finish) for a in failing]
        used: list[list[str]] = [[] for _ in failing]
        for turn in range(self.rounds):
            # the draw depends on the attempt, not on its neighbours, so that a resumed run draws the same
            drawn = [random.Random(f"{seed}:{turn}:{a.id}").choice(law) for a in failing]
            critiques = self._ask(model, [_critique(a, answer.text, p) for a, answer, p in zip(failing, answers, drawn, strict=True)], seed + turn)
            asked = [_revision(a, answer.text, p, c.text) for a, answer, p, c in zip(failing, answers, drawn, critiques, strict=True)]
            for i, (critique, revision) in enumerate(zip(critiques, self._ask(model, asked, seed + turn), strict=True)):
                if revision.text and not _copied(critique.text, answers[i].text) and revision.text != answers[i].text.strip():
                    answers[i] = revision
                    used[i].append(drawn[i].name)
        # a later round may have come back to the first answer, which then is no better than itself
        made = [(a, answer, names) for a, answer, names in zip(failing, answers, used, strict=True) if names and answer.text != a.response.strip()]
        groups = [self._group(*one) for one in made]
        for group in groups:
            sink(group)
        return groups

    def _ask(self, model: Model, conversations: list[Conversation], seed: int) -> list[Completion]:
        """Answers without surrounding space; an error is an empty one. Whether one was cut off is kept: its end is not to be taught."""
        answers = model.sample(conversations, max_tokens=self.max_tokens, temperature=self.temperature, seed=seed) if conversations else []
        return [Completion(text=c[0].text.strip() if c[0].finish != "error" else "", finish=c[0].finish) for c in answers]

    def _group(self, attempt: Attempt, revision: Completion, names: list[str]) -> Group:
        asked = attempt.prompt.model_copy(update={"messages": attempt.sent})
        note = f"{self.name}: {', '.join(names)} ({len(names)} of {self.rounds} rounds kept)"
        first = Completion(text=attempt.response, finish=attempt.finish)
        return Group(prompt=asked, completions=(revision, first), targets=(1.0, 0.0), annotator=note)


def _critique(attempt: Attempt, answer: str, principle: Principle) -> Conversation:
    ask = principle.wording("critique", attempt.prompt.language)
    return (*attempt.sent, Message(role="assistant", content=answer), Message(role="user", content=ask))


def _revision(attempt: Attempt, answer: str, principle: Principle, critique: str) -> Conversation:
    ask = principle.wording("revision", attempt.prompt.language)
    return (*_critique(attempt, answer, principle), Message(role="assistant", content=critique), Message(role="user", content=ask))


def _copied(critique: str, answer: str) -> bool:
    words = critique.lower().split()
    known = set(answer.lower().split())
    return bool(words) and sum(w in known for w in words) > TOO_ALIKE * len(words)
