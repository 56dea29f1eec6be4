"""Automatic step labels: a step is as good as the share of continuations from it that reach the known answer (Math-Shepherd).

What it does: samples several solutions to each problem, cuts them into lines, goes on from the end of every line several times, and labels
              the line with how often the right final answer is reached.
Use it when:  final answers are known and nobody has labelled steps. Train with align/process_reward, whose labels process read these, and
              whose labels outcome read the reward of the whole solution; read it with align/learned_reward.
Formula:      soft: value of a step = right continuations / continuations; hard: 1 if any is right, else 0. The last step is 1 if the solution's
              own answer is right, else 0. With a selector, of the n that are labelled 80 % are the wrong solutions that it scores highest, and the rest
              the highest of those that remain, right or wrong.
Defaults:     4 solutions per problem, 8 continuations per step (paper), temperature 0.7, soft labels, no selector.
Limits:       the attempts say which problems, whatever came of them. The completer must go on from a begun answer. A step that only looks wrong is
              right if it mends it, and few continuations of a weak one say little of early steps. The cost is solutions x steps x continuations. With
              a selector mostly wrong solutions are labelled, which is what a process model needs and no picture of what the model does.
Source:       Wang et al. 2023, arXiv:2312.08935, section 3; the choice of solutions: Lightman et al. 2023, arXiv:2305.20050, section 4.2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from fiducial.align import learned_reward
from fiducial.align.asking import ask, asked, counted, distinct, helper, portions
from fiducial.align.learned_reward import LearnedReward
from fiducial.core.errors import ModelError
from fiducial.core.records import Attempt, Completion, Conversation, Group, Message, Prompt
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.data.answers import known_answers, reaches
from fiducial.data.steps import beginnings, cut, solution

if TYPE_CHECKING:
    from fiducial.models.base import Model

log = logging.getLogger(__name__)

CONVINCING = 0.8
"""Share of the labelled solutions that are to be wrong ones, where a selector chooses them."""


@final
@dataclass(frozen=True, slots=True)
class StepLabels(Maker):
    """Sampled solutions with a value per step."""

    answers: str = ""
    """File with the problems (column prompt, problem or question) and their final answers (answer, reference or target); without one the
    references of the attempts' prompts are taken."""
    solutions: int = 4
    """Solutions sampled per problem; equal ones count once."""
    selector: str = ""
    """Name of a trained process reward model, such as run:ID, that chooses which of them are worth labelling; without one all are labelled."""
    labelled: int = 0
    """Solutions that it chooses per problem: 1 to less than `solutions`."""
    continuations: int = 8
    """Continuations sampled from the end of each step but the last."""
    hard: bool = False
    """Whether one right continuation makes a step right."""
    completer: str = ""
    """Model that continues, by name; the model itself by default."""
    max_tokens: int = 256
    """Longest solution or continuation, in tokens."""
    temperature: float = 0.7
    """Of solutions and continuations."""

    def __post_init__(self) -> None:
        if min(self.solutions, self.continuations, self.max_tokens) < 1 or self.temperature <= 0:
            given = f"{self.solutions}, {self.continuations}, {self.max_tokens}, {self.temperature}"
            raise ValueError(f"solutions, continuations and max_tokens must be at least 1 and temperature above 0, got {given}")
        if bool(self.selector) != bool(self.labelled) or not 0 <= self.labelled < self.solutions:
            given = f"got selector '{self.selector}', labelled {self.labelled} of {self.solutions}"
            raise ValueError(f"a selector chooses some of the solutions: give it with labelled, 1 to less than solutions, or neither; {given}")

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """One group per problem whose answer is known: its solutions, values of their steps, and 1 or 0 as the reward of each."""
        problems = {a.prompt.text.strip(): a for a in attempts}
        known = {text: a.prompt.reference for text, a in problems.items() if a.prompt.reference} | (known_answers(self.answers) if self.answers else {})
        fitting = [a for text, a in problems.items() if text in known]
        without = ["its answer is not known: name a file with --answers"] * (len(problems) - len(fitting))
        groups = []
        given_up = 0
        self._refuse_selector()
        how: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": seed}
        with helper(self.completer, model) as completer:
            for some in portions(fitting):
                sampled = [[c for c in distinct(row) if c.finish == "stop"] for row in ask(model, [asked(a) for a in some], k=self.solutions, **how)]
                golds = [known[a.prompt.text.strip()] for a in some]
                drawn = [len(row) for row in sampled]
                sampled = [self._chosen(asked(a), row, gold) for a, row, gold in zip(some, sampled, golds, strict=True)] if self.selector else sampled
                found = [self._labelled(asked(a), row, gold, completer, how) for a, row, gold in zip(some, sampled, golds, strict=True)]
                given_up += _given_up([c for labelled in found for c in labelled], completer)
                for attempt, gold, labelled, of in zip(some, golds, found, drawn, strict=True):
                    if not labelled:
                        without.append("no solution came to an end")
                        continue
                    group = Group(
                        prompt=attempt.prompt.model_copy(update={"messages": asked(attempt), "reference": gold}),
                        completions=tuple(labelled),
                        rewards=tuple(float(reaches(c.text, gold)) for c in labelled),
                        annotator=f"{self.name}: {self.continuations} continuations by {completer.uri}",
                        provenance={"selector": self.selector, "chosen_of": of} if self.selector else {},
                    )
                    groups.append(group)
                    sink(group)
        if given_up:
            log.warning("%d steps have no value, since all continuations from them failed", given_up)
        if without:
            log.warning("%d of %d problems gave no group: %s", len(without), len(problems), counted(without))
        return groups

    def _refuse_selector(self) -> None:
        """Raises ModelError for a selector that reads no steps."""
        from fiducial.models.scorehead import BY_STEPS

        head = learned_reward.opened(self.selector).head if self.selector else None
        if self.selector and (head is None or head.trained_by != BY_STEPS):
            raise ModelError(f"{self.selector} does not score steps", hint="name a run of align/process_reward")

    def _chosen(self, conversation: Conversation, solved: Sequence[Completion], gold: str) -> list[Completion]:
        """The solutions to one problem that are worth labelling, the most convincing first."""
        group = Group(prompt=Prompt(messages=conversation), completions=tuple(solved))
        (scores,) = LearnedReward(models=(self.selector,)).score([group])
        return [solved[i] for i in convincing(scores, [reaches(c.text, gold) for c in solved], self.labelled)]

    def _labelled(self, conversation: Conversation, solved: Sequence[Completion], gold: str, completer: Model, how: dict[str, Any]) -> list[Completion]:
        """The solutions with the values of their steps; all beginnings are continued in one call."""
        steps = [cut(c.text) for c in solved]
        begun = [text for lines in steps for text in beginnings(lines)[:-1]]
        rows = iter(ask(completer, [(*conversation, Message(role="assistant", content=text)) for text in begun], k=self.continuations, **how))
        texts = iter(begun)
        found = []
        for lines in steps:
            values: list[float | None] = [self._value(next(texts), next(rows), gold) for _ in lines[1:]]
            found.append(solution(lines, [*values, float(reaches(beginnings(lines)[-1], gold))]))
        return found

    def _value(self, begun: str, continued: Sequence[Completion], gold: str) -> float | None:
        """None where no continuation could be had. One that was cut off has not reached the answer."""
        there = [c for c in continued if c.finish not in ("error", "filtered")]
        right = [c.finish == "stop" and reaches(begun + c.text, gold) for c in there]
        return None if not right else float(any(right)) if self.hard else sum(right) / len(right)


def convincing(scores: Sequence[float | None], right: Sequence[bool], count: int) -> list[int]:
    """Which of some solutions are worth labelling: the wrong ones with the highest scores, as many as four fifths of `count` rounded to a whole number,
    then the highest of all that remain. Of equals the first; without a score none.

    >>> convincing([0.9, 0.2, 0.8, 0.7, 0.6, 0.1, 0.5], [True, False, False, True, False, False, False], 5)
    [2, 4, 6, 1, 0]
    """
    known = {i: score for i, score in enumerate(scores) if score is not None}
    order = sorted(known, key=lambda i: -known[i])
    wrong = [i for i in order if not right[i]][: round(CONVINCING * count)]
    return [*wrong, *[i for i in order if i not in wrong][: count - len(wrong)]]


def _given_up(solutions: Sequence[Completion], completer: Model) -> int:
    """Steps that could not be continued at all. Raises ModelError where no step of the solutions could be."""
    steps = [value for c in solutions for value in c.values[:-1]]
    if steps and all(value is None for value in steps):
        raise ModelError(
            f"{completer.uri} continued none of {len(steps)} begun solutions",
            hint="a model with its weights here can; so can a server that goes on from a begun answer, called openai+prefill:NAME",
        )
    return sum(value is None for value in steps)
