"""Solutions with a label per step, from the rows of PRM800K and from the columns of TRL's stepwise sets.

    {"prompt": "1 + 2 * 3?", "completions": ["2 * 3 = 6", "1 + 6 = 8"], "labels": [true, false]}

Steps are joined by line breaks, and each ends with the one after it. A step's value is 1 for right, 0 for wrong, None where nobody said.
Source: the README of openai/prm800k; Lightman et al. 2023, arXiv:2305.20050, by whom neutral steps count as right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from fiducial.core.errors import DataError
from fiducial.core.records import Completion

BREAK = "\n"
"""What stands between steps; `separator` of align/learned_reward."""
VALUES: dict[int | None, float | None] = {1: 1.0, 0: 1.0, -1: 0.0, None: None}
"""Rating of PRM800K -> value; a step that makes no progress is not wrong."""


class SetAside(Exception):  # noqa: N818 nothing is wrong with the row
    """A row that is well formed and not meant to be learnt from; the message says why."""


class _Step(BaseModel):
    text: str
    rating: Literal[-1, 0, 1] | None = None
    flagged: bool | None = None


class _Place(BaseModel):
    """What was written at one place of a solution: the model's steps, of which one was gone on with, or else the labeller's own."""

    completions: list[_Step] | None = None
    human_completion: _Step | str | None = None
    chosen_completion: int | None = None

    def gone_on_with(self) -> tuple[str, float | None] | None:
        """Text and value of the step on which the solution goes on; None where it ends. What a labeller wrote counts as right."""
        if self.chosen_completion is not None:
            step = (self.completions or [])[self.chosen_completion]
            return step.text, VALUES[step.rating]
        if self.human_completion is None:
            return None
        return (self.human_completion if isinstance(self.human_completion, str) else self.human_completion.text), 1.0


class _Label(BaseModel):
    steps: list[_Place]
    finish_reason: str | None = None


class _Question(BaseModel):
    problem: str


class _Row(BaseModel):
    question: _Question
    label: _Label
    is_quality_control_question: bool | None = None
    is_initial_screening_question: bool | None = None

    def unused(self) -> str:
        """Why the row is not to be learnt from; empty when it is."""
        if self.is_initial_screening_question:
            return "screening"
        if self.is_quality_control_question:
            return "quality control"
        if self.label.finish_reason in ("bad_problem", "give_up"):
            return self.label.finish_reason
        flagged = any(step.flagged for place in self.label.steps for step in place.completions or ())
        return "flagged" if flagged else ""


def is_prm800k(values: Mapping[str, Any]) -> bool:
    """Whether the row is laid out as in PRM800K."""
    return isinstance(values.get("question"), dict) and isinstance(values.get("label"), dict)


def prm800k(values: Mapping[str, Any], where: str) -> tuple[str, tuple[Completion, ...]]:
    """The problem of a row of PRM800K, and its solution up to the first error.

    Every other step that was rated follows as a completion of its own, on which only that step has a value: what stands before it is
    shared, and judged once. Raises DataError with `where`, SetAside for rows of the screening and of quality control, rows whose
    labeller gave up, found the problem bad or flagged a step, and rows without a rated step.
    """
    try:
        row = _Row.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint="see the README of openai/prm800k for the layout") from error
    if reason := row.unused():
        raise SetAside(reason)
    path: list[tuple[str, float | None]] = []
    others: list[Completion] = []
    for number, place in enumerate(row.label.steps):
        if place.chosen_completion is not None and not 0 <= place.chosen_completion < len(place.completions or ()):
            raise DataError(f"{where}: label.steps.{number}.chosen_completion is {place.chosen_completion}", hint="it counts the completions from 0")
        for k, step in enumerate(place.completions or ()):
            if k != place.chosen_completion and step.rating is not None:
                others.append(solution([*(text for text, _ in path), step.text], [*(None for _ in path), VALUES[step.rating]], where))
        went = place.gone_on_with()
        if went is None:
            break
        path.append(went)
        if went[1] == 0:
            break
    whole = (solution([text for text, _ in path], [value for _, value in path], where),) if any(value is not None for _, value in path) else ()
    if not (whole or others):
        raise SetAside("without a rated step")
    return row.question.problem, (*whole, *others)


def stepwise(values: Mapping[str, Any], where: str) -> Completion:
    """The solution in TRL's columns `completions` and `labels`. Labels are true, false, a probability of being right, or null. Raises DataError."""
    steps, labels = values["completions"], values["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise DataError(
            f"{where}: 'completions' must be a list of steps and 'labels' a list with a label for each", hint='{"completions": ["1+1=2"], "labels": [true]}'
        )
    if len(steps) != len(labels):
        raise DataError(f"{where}: {len(steps)} completions but {len(labels)} labels", hint="one label per step is needed; null where it is not known")
    for number, label in enumerate(labels, 1):
        if label is not None and not (isinstance(label, int | float) and 0 <= label <= 1):
            raise DataError(f"{where}: the label of step {number} is {label!r}", hint="a label is true, false, a probability of being right, or null")
    return solution(steps, [None if label is None else float(label) for label in labels], where)


def solution(steps: Sequence[str], values: Sequence[float | None], where: str = "solution") -> Completion:
    """Steps and their values as one completion. Raises DataError for a step without text.

    >>> solution(["1+1=2", "2*3=7"], [1.0, 0.0]).ends
    (6, 11)
    """
    texts = [step.strip("\r\n") for step in steps]
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise DataError(f"{where}: step {number} is empty", hint="leave it out, with its label")
    begun = beginnings(texts)
    return Completion(text=begun[-1] if begun else "", ends=tuple(map(len, begun)), values=tuple(values))


def cut(text: str, separator: str = BREAK) -> list[str]:
    """The steps of a text that does not say where they end: what stands between separators and is more than white space.

    >>> cut("1+1=2\\n\\n2*3=6\\n")
    ['1+1=2', '2*3=6']
    """
    return [part.strip("\r\n") for part in text.split(separator) if part.strip()]


def beginnings(steps: Sequence[str], separator: str = BREAK) -> list[str]:
    """What stands before the end of each step, with the separator after every one but the last.

    >>> beginnings(["1+1=2", "2*3=6"])
    ['1+1=2\\n', '1+1=2\\n2*3=6']
    """
    return list(accumulate([step + separator for step in steps[:-1]] + list(steps[-1:])))
