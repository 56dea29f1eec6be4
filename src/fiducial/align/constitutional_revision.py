"""Constitutional revision: the model criticises and rewrites its own answers (the supervised stage of constitutional AI).

What it does: for each failing attempt, draws a principle, asks a critic what is wrong with the answer, asks for a revision, and goes on
              from the revision with the critique dropped. What is taught is the last revision over the first answer, or revisions alone.
Use it when:  the critic (by default the model itself) can criticise. A model of a few hundred million parameters cannot do so reliably:
              use align/failure_pairs there, or name a stronger critic. For labels of a feedback model use align/ai_preferences.
Defaults:     2 rounds (paper: up to 4), the shipped constitution, principles drawn by seed, temperature 0.7, pairs.
Limits:       pairs are told apart by style, and are not the paper's: it trains on every revision (teach `every`). Finished critiques and
              revisions stand before the conversation, as in the paper, where the constitution has `examples`; the shipped one has none.
              Critiques that repeat the answer and revisions that equal theirs are dropped, with the reason in the provenance.
Source:       Bai et al. 2022, arXiv:2212.08073, section 3; pairs as in the alignment handbook's variant.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final

from fiducial.align.asking import ask, asked, counted, helper, portions, texts
from fiducial.core.records import Attempt, Completion, Conversation, Group, Message
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.data.constitution import Example, Principle, constitution, examples
from fiducial.data.languages import nearest
from fiducial.data.overlap import copied

if TYPE_CHECKING:
    from fiducial.models.base import Model

log = logging.getLogger(__name__)

TOO_ALIKE = 0.8
"""Share of a critique's words that may come from the answer it criticises."""


@final
@dataclass(frozen=True, slots=True)
class ConstitutionalRevision(Maker):
    """Critique and revision under drawn principles."""

    principles: str = ""
    """A constitution file (YAML); the shipped one by default."""
    critic: str = ""
    """Model that criticises and revises, by name; the model itself by default."""
    teach: Literal["pairs", "last", "every"] = "pairs"
    """The last revision over the first answer, the last revision alone, or every revision alone."""
    rounds: int = 2
    """Critique-and-revision rounds per answer, at least 1."""
    max_tokens: int = 160
    """Longest critique or revision, in tokens."""
    temperature: float = 0.7
    """Of critiques and revisions; 0 for the likeliest."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(f"rounds and max_tokens must be at least 1, temperature at least 0; got {self.rounds}, {self.max_tokens}, {self.temperature}")
        if self.teach not in ("pairs", "last", "every"):
            raise ValueError(f"teach is pairs, last or every, not '{self.teach}'")

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """Groups for the failing attempts whose revision is usable: one each, or with `every` one per usable revision."""
        law, shown = constitution(self.principles or None), examples(self.principles or None)
        failing = [a for a in attempts if a.scored and a.failed]
        groups: list[Group] = []
        why: list[str] = []
        with helper(self.critic, model) as critic:
            for some in portions(failing):
                revisions = [_Revised(a, _asked(a, shown, law), Completion(text=a.response, finish=a.finish)) for a in some]
                for turn in range(self.rounds):
                    self._round(critic, revisions, law, turn, seed)
                why += [r["dropped"] for one in revisions for r in one.rounds if "dropped" in r]
                for group in (g for one in revisions for g in self._groups(one, len(shown))):
                    groups.append(group)
                    sink(group)
        if why:
            log.warning("%d of %d revisions are left out: %s", len(why), len(failing) * self.rounds, counted(why))
        return groups

    def _round(self, critic: Model, revisions: list[_Revised], law: list[Principle], turn: int, seed: int) -> None:
        # the draw depends on the attempt, not on its neighbours, so that a resumed run draws the same
        drawn = [random.Random(f"{seed}:{turn}:{one.attempt.id}").choice(law) for one in revisions]
        critiques = texts(
            critic,
            [_critique(one, p) for one, p in zip(revisions, drawn, strict=True)],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=seed + turn,
        )
        requests = [_revision(one, p, text) for one, p, text in zip(revisions, drawn, critiques, strict=True)]
        answers = ask(critic, requests, max_tokens=self.max_tokens, temperature=self.temperature, seed=seed + turn)
        for one, principle, critique, (revision,) in zip(revisions, drawn, critiques, answers, strict=True):
            one.take(principle.name, critique, revision)

    def _groups(self, one: _Revised, shown: int) -> list[Group]:
        # a later round may have come back to the first answer, which then is no better than itself
        usable = [c for c in one.kept if c.text != one.attempt.response.strip()]
        if not usable or (self.teach != "every" and one.kept[-1] != usable[-1]):
            return []
        names = [r["principle"] for r in one.rounds if "dropped" not in r]
        note = f"{self.name}: {', '.join(names)} ({len(names)} of {self.rounds} rounds kept)"
        first = Completion(text=one.attempt.response, finish=one.attempt.finish)
        sets: list[tuple[Completion, ...]] = [(c,) for c in usable]
        if self.teach != "every":
            sets = [(usable[-1], first) if self.teach == "pairs" else (usable[-1],)]
        prompt = one.attempt.prompt.model_copy(update={"messages": asked(one.attempt)})
        said = {"rounds": one.rounds, "examples": shown}
        return [Group(prompt=prompt, completions=c, targets=(1.0,) + (0.0,) * (len(c) - 1), annotator=note, provenance=said) for c in sets]


@dataclass(slots=True)
class _Revised:
    """One attempt on its way through the rounds."""

    attempt: Attempt
    asked: Conversation
    """What stands before the answer: the examples and what was asked."""
    answer: Completion
    """What the next round starts from."""
    kept: list[Completion] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Principle and critique of each round, and why its revision was dropped."""

    def take(self, principle: str, critique: str, revision: Completion) -> None:
        """Goes on from `revision`, unless the round changed nothing."""
        self.rounds.append({"principle": principle, "critique": critique})
        if copied(critique, self.answer.text) > TOO_ALIKE:
            self.rounds[-1]["dropped"] = "critique repeats the answer"
        elif not critique or not revision.text:
            self.rounds[-1]["dropped"] = "no critique or revision came"
        elif revision.text == self.answer.text.strip():
            self.rounds[-1]["dropped"] = "revision equals its input"
        else:
            self.answer = revision
            self.kept.append(revision)


def _asked(attempt: Attempt, shown: Sequence[Example], law: Sequence[Principle]) -> Conversation:
    """What was asked, with the examples before it, but after what the system says."""
    talk = asked(attempt)
    start = next((i for i, turn in enumerate(talk) if turn.role != "system"), len(talk))
    return (*talk[:start], *(turn for example in shown for turn in _turns(example, law, attempt.prompt.language)), *talk[start:])


def _turns(example: Example, law: Sequence[Principle], language: str) -> Conversation:
    """An example as it went: its conversation, and a critique and a revision as answers to what its principle asks for."""
    (principle,) = (p for p in law if p.name == example.principle)
    spoken = nearest(example.critique, language)
    parts = ((principle.wording("critique", spoken), example.critique), (principle.wording("revision", spoken), example.revision))
    rest = (turn for request, text in parts for turn in (Message(role="user", content=request), Message(role="assistant", content=text[spoken])))
    return (*example.conversation[spoken], *rest)


def _critique(one: _Revised, principle: Principle) -> Conversation:
    ask_for = principle.wording("critique", one.attempt.prompt.language)
    return (*one.asked, Message(role="assistant", content=one.answer.text), Message(role="user", content=ask_for))


def _revision(one: _Revised, principle: Principle, critique: str) -> Conversation:
    ask_for = principle.wording("revision", one.attempt.prompt.language)
    return (*_critique(one, principle), Message(role="assistant", content=critique), Message(role="user", content=ask_for))
