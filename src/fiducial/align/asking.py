"""What makers share when they ask models for text: helpers opened by name, clean answers, work in portions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from fiducial.core.records import Attempt, Completion, Conversation
from fiducial.data.languages import tongue

if TYPE_CHECKING:
    from fiducial.models.base import Model

T = TypeVar("T")
PORTION = 32
"""Items worked on together; their groups go to the sink before the next portion begins."""


@contextmanager
def helper(uri: str, model: Model) -> Iterator[Model]:
    """The model named `uri`, closed afterwards; `model` itself, left open, where no name is given. Raises ModelError."""
    if not uri:
        yield model
        return
    other = model.beside(uri)
    try:
        yield other
    finally:
        other.close()


def ask(
    model: Model, conversations: Sequence[Conversation], *, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0, k: int = 1, seed: int = 0
) -> list[list[Completion]]:
    """`k` answers per conversation, in order, without surrounding space; a failed one has no text. Whether one was cut off is kept."""
    if not conversations:
        return []
    answers = model.sample(conversations, k=k, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return [[Completion(text=c.text.strip() if c.finish != "error" else "", finish=c.finish, error=c.error) for c in row] for row in answers]


def texts(model: Model, conversations: Sequence[Conversation], *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """One answer per conversation, as text; empty where there is none."""
    return [row[0].text for row in ask(model, conversations, max_tokens=max_tokens, temperature=temperature, seed=seed)]


def distinct(answers: Sequence[Completion]) -> list[Completion]:
    """The answers that hold text and were not blocked, each text once, in order."""
    first: dict[str, Completion] = {}
    for c in answers:
        if c.text and c.finish != "filtered":
            first.setdefault(c.text, c)
    return list(first.values())


def portions(items: Sequence[T], size: int = PORTION) -> Iterator[Sequence[T]]:
    """`items`, `size` at a time.

    >>> list(portions("abcde", 2))
    ['ab', 'cd', 'e']
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


def transcript(conversation: Conversation, language: str) -> str:
    """The turns as text under the names of who speaks, in English or Chinese."""
    names = {"en": {"system": "System", "user": "User", "assistant": "Assistant"}, "zh": {"system": "系统", "user": "用户", "assistant": "助手"}}
    return "\n\n".join(f"{names[tongue(language)][m.role]}: {m.content}" for m in conversation)


def listed(text: str) -> list[str]:
    """The lines of an answer that lists something, without numbers, bullets and quotes.

    >>> listed("1. Tea\\n\\n- 'Coffee'\\n(3) 水")
    ['Tea', 'Coffee', '水']
    """
    lines = [re.sub(r"^\s*(?:[-*•·]|[(（]?\d{1,2}[.)、）．:：])\s*", "", line).strip().strip("\"'“”‘’") for line in text.splitlines()]
    return [line for line in lines if line]


def entries(answer: Completion) -> list[str]:
    """The lines of an answer that lists something, without the last one of an answer that was cut off.

    >>> entries(Completion(text="1. Write a haiku.\\n2. Write a sonnet about the", finish="length"))
    ['Write a haiku.']
    """
    return listed(answer.text)[: -1 if answer.finish == "length" else None]


def counted(reasons: Sequence[str]) -> str:
    """How often each reason occurs, the commonest first, as text.

    >>> counted(["empty", "echo", "empty"])
    '2 empty, 1 echo'
    """
    return ", ".join(f"{n} {reason}" for reason, n in Counter(reasons).most_common())


def asked(attempt: Attempt) -> Conversation:
    """What the model was sent; the bare prompt where the attempt does not say."""
    return attempt.sent or attempt.prompt.messages
