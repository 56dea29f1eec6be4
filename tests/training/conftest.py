"""Groups a tiny model can be trained on in milliseconds, and models with a chosen row budget."""

from dataclasses import replace

import pytest

from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.local import LocalModel
from fiducial.models.scoring import Engine
from fiducial.models.scripted import tiny


def group(number, *texts, **fields):
    """A group with unequal lengths, so that a wrong normalisation shows."""
    texts = texts or ("no" + "o" * (3 * number), "yes, " + "e" * (number + 1))
    return Group(prompt=Prompt(messages=user(f"question {number}")), completions=tuple(Completion(text=t) for t in texts), **fields)


def pairs(count=8):
    return [group(n) for n in range(count)]


def budgeted(budget, seed=0):
    """A tiny model whose rows hold at most `budget` tokens."""
    base = tiny(seed=seed)

    class Budgeted(LocalModel):
        @property
        def engine(self):
            if self._engine is None or self._engine.module is not self.module:
                self._engine = Engine(self.module, backend="tree", budget=budget)
                self._engine._part = replace(self._engine._part, crossover=1e9)  # the budget alone decides about rows
            return self._engine

    return Budgeted(base.module, base.tokenizer, uri="tiny")


@pytest.fixture
def made():
    """`group`, `pairs` and `budgeted` for tests that cannot import a conftest."""
    from types import SimpleNamespace

    return SimpleNamespace(group=group, pairs=pairs, budgeted=budgeted)
