"""A model that answers by rule and remembers what it was asked."""

from collections.abc import Callable

import pytest

from fiducial.core.records import Completion, Conversation
from fiducial.models.base import Model


class Rule(Model):
    """Answers with `answer(conversation)`; reports completions last one first, as a real batch may."""

    uri = "rule:"
    fingerprint = "rule-1"

    def __init__(self, answer: Callable[[Conversation], str | Completion] = lambda c: f"echo {c[-1].content}") -> None:
        self.answer = answer
        self.calls: list[dict] = []

    def sample(self, conversations, *, k=1, max_tokens=64, temperature=0.0, top_p=1.0, stop=(), seed=0, arrived=None):
        self.calls.append({"conversations": list(conversations), "k": k, "max_tokens": max_tokens, "temperature": temperature, "seed": seed})
        answers = [self.answer(c) for c in conversations]
        found = [(a if isinstance(a, Completion) else Completion(text=a, prompt_tokens=7, completion_tokens=3),) for a in answers]
        for index in reversed(range(len(found))):
            if arrived:
                arrived(index, found[index])
        return found


@pytest.fixture
def rule() -> type[Rule]:
    return Rule
