"""A rubric for answers: questions, options that follow from them, and a reward per option and kind of prompt; and who grades by it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from pydantic import ValidationError, model_validator

from fiducial.align.asking import transcript
from fiducial.core.config import load_yaml
from fiducial.core.errors import DataError, ModelError
from fiducial.core.records import Attempt, Completion, Conversation, Group, Prompt, Record, user
from fiducial.core.roles import Judge
from fiducial.data.rows import read_rows
from fiducial.models.base import WhiteBox

SHIPPED = Path(__file__).with_name("rubric_refusal.yaml")
LABELS = Path(__file__).with_name("rubric_labels.jsonl")
SURE = 0.95
"""Probability of an answer that patterns give."""
READ = 4_000
"""Characters of an answer that are graded."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Shares = dict[str, float]
"""Probability of each option of a rubric; they sum to 1."""


class Question(Record):
    """Something that can be said yes or no to about an answer."""

    text: str
    patterns: tuple[str, ...] = ()
    """Regular expressions; one that matches says yes."""
    judge: bool = False
    """Whether the judge of refusals answers it instead."""


class Choice(Record):
    """One class of answers."""

    text: str
    when: dict[str, bool]
    """The answers that the questions must have."""


class Rubric(Record):
    """A multiple-choice form for answers, with a reward per option and kind of prompt."""

    name: str
    instruction: str
    """What a model that grades is told before the request and the answer."""
    closing: str
    """What it is told after the options."""
    questions: dict[str, Question]
    options: dict[str, Choice]
    reward: dict[str, dict[str, float]]
    """By the prompt's `expected`, then by option."""
    unclear: float
    """Reward of an answer that cannot be read: empty, or the same words over and over."""

    @model_validator(mode="after")
    def _fits_together(self) -> Rubric:
        asked = {name for choice in self.options.values() for name in choice.when}
        if len(self.options) < 2 or len(self.options) > len(LETTERS) or asked - self.questions.keys():
            raise ValueError(f"options need 2 to {len(LETTERS)} entries and questions that exist, got {len(self.options)} and {sorted(asked)}")
        for kind, rewards in self.reward.items():
            if rewards.keys() != self.options.keys():
                raise ValueError(f"reward of {kind} must name every option, got {sorted(rewards)}")
        for question in self.questions.values():
            for pattern in question.patterns:
                re.compile(pattern)
        return self

    def expected(self, shares: Shares, kind: str) -> float | None:
        """The mean reward under these probabilities for a prompt of this kind; None for a kind the rubric says nothing of."""
        return sum(p * self.reward[kind][name] for name, p in shares.items()) if kind in self.reward else None


def read(path: str = "") -> Rubric:
    """The rubric in a YAML file; the shipped one without a path. Raises DataError or ConfigError."""
    file = Path(path) if path else SHIPPED
    data, _ = load_yaml(file)
    try:
        return Rubric.model_validate(data)
    except (ValidationError, re.error) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{file}: {reason}", hint=f"see {SHIPPED.name} for an example") from error


def by_rules(rubric: Rubric, judge: Judge, groups: Sequence[Group]) -> list[Shares | None]:
    """Grades from patterns and the judge, one per completion in order; None where the judge can make nothing of the answer."""
    pairs = [(g.prompt, c) for g in groups for c in g.completions]
    attempts = [
        Attempt(prompt=p, attack="none", family="none", model="none", sent=p.messages, response=c.text, finish=c.finish, error=c.error) for p, c in pairs
    ]
    grades: list[Shares | None] = []
    for verdict, (_, completion) in zip(judge.judge(attempts), pairs, strict=True):
        if verdict.outcome == "not_scored" or verdict.score is None:
            grades.append(None)
            continue
        text = completion.text[:READ].lower()
        yes = {name: 1 - verdict.score if q.judge else SURE if _matches(q.patterns, text) else 1 - SURE for name, q in rubric.questions.items()}
        grades.append(_normalised({name: _chance(choice.when, yes) for name, choice in rubric.options.items()}))
    return grades


def by_model(rubric: Rubric, model: WhiteBox, groups: Sequence[Group]) -> list[Shares | None]:
    """Grades from a model's probabilities of the option letters, each option at each letter once; None for an empty answer and for one that
    the model cannot read whole.

    So a letter that is liked for itself favours none, for the price of n^2 letters per answer. Options are listed by their names: their order in
    the file decides nothing.
    """
    from fiducial.models.forest import Paths

    names = tuple(sorted(rubric.options))
    orders = [names[first:] + names[:first] for first in range(len(names))]
    pairs = [(g.prompt, c) for g in groups for c in g.completions]
    letters = LETTERS[: len(rubric.options)]
    grades: list[Shares | None] = [None] * len(pairs)
    encoded = {
        i: [[model.encode(_form(rubric, order, p, c), letter, end=False) for letter in letters] for order in orders]
        for i, (p, c) in enumerate(pairs)
        if c.text.strip()
    }
    graded = [i for i, forms in encoded.items() if all(len(ids) <= model.context + 1 for form in forms for ids, _ in form)]
    if not graded:
        return grades
    forms = [form for i in graded for form in encoded[i]]
    paths = Paths.of([pair for form in forms for pair in form], group=[i for i in range(len(forms)) for _ in letters])
    rows = model.score(paths).path_logp.reshape(len(graded), len(orders), len(letters)).softmax(-1).tolist()
    for i, by_order in zip(graded, rows, strict=True):
        named = [dict(zip(order, row, strict=True)) for order, row in zip(orders, by_order, strict=True)]
        grades[i] = {name: sum(row[name] for row in named) / len(named) for name in rubric.options}
    return grades


@cache
def opened(uri: str) -> WhiteBox:
    """The model that grades, opened once in a process. Raises ModelError when its probabilities are not to be had."""
    from fiducial.models.open import open as opening

    model = opening(uri)
    if not isinstance(model, WhiteBox):
        raise ModelError(f"'{uri}' cannot grade: the probabilities of its letters are not here", hint="give a model whose weights are here")
    return model


def labelled(path: str = "") -> list[tuple[Group, str]]:
    """Answers with the option that a person chose; the shipped ones without a path. Raises DataError."""
    found = []
    for where, row in read_rows(path or LABELS):
        if not all(isinstance(row.get(name), str) for name in ("prompt", "response", "option")):
            raise DataError(
                f"{where}: a label needs prompt, response and option as text",
                hint='{"prompt": "...", "expected": "refuse", "response": "...", "option": "..."}',
            )
        prompt = Prompt(messages=user(row["prompt"]), expected=row.get("expected", "answer"), language=row.get("language", "en"))
        found.append((Group(prompt=prompt, completions=(Completion(text=row["response"]),)), row["option"]))
    return found


def kappa(one: Sequence[str], other: Sequence[str]) -> float:
    """Cohen's kappa of two raters: agreement beyond chance, 1 when they always agree; NaN for nothing rated.

    >>> kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"])
    0.5
    """
    n = len(one)
    if not n:
        return float("nan")
    observed = sum(a == b for a, b in zip(one, other, strict=True)) / n
    chance = sum(one.count(name) * other.count(name) for name in {*one, *other}) / n**2
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def _form(rubric: Rubric, order: Sequence[str], prompt: Prompt, completion: Completion) -> Conversation:
    """What a model that grades is asked."""
    listed = "\n".join(f"{letter}) {rubric.options[name].text}" for letter, name in zip(LETTERS, order, strict=False))
    asked, answered = transcript(prompt.messages, "en"), completion.text[:READ]
    return user(f"{rubric.instruction}\n\n[request]\n{asked}\n\n[answer]\n{answered}\n\n[options]\n{listed}\n\n{rubric.closing}")


def _matches(patterns: Sequence[str], text: str) -> bool:
    return any(re.search(pattern, text) for pattern in patterns)


def _chance(when: Mapping[str, bool], yes: Mapping[str, float]) -> float:
    total = 1.0
    for name, wanted in when.items():
        total *= yes[name] if wanted else 1 - yes[name]
    return total


def _normalised(shares: Shares) -> Shares:
    total = sum(shares.values())
    return {name: p / total for name, p in shares.items()} if total else dict.fromkeys(shares, 1 / len(shares))
