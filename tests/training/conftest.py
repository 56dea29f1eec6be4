"""Groups a tiny model can be trained on in milliseconds, and models with a chosen row budget."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from fiducial.align.dft import DFT
from fiducial.align.dpo import DPO
from fiducial.align.kto import KTO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.roles import Objective
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


@dataclass(frozen=True, slots=True)
class Valued(Objective):
    """Reads everything there is of single tokens: log-probabilities under policy and reference, a head's value before each, and facts."""

    reads: ClassVar = ("tokens", "values")
    needs_reference: ClassVar = True

    def __call__(self, policy, reference=None):
        ratio = (policy.tokens.logp - reference.tokens.logp).exp()
        values = policy.tokens.values
        loss = -ratio * (policy.tokens.given["value"] - values.detach()) + (values - 0.1 * policy.tokens.position).square()
        return policy.summed(loss).sum(1)


OBJECTIVES = {
    "sft": SFT(),
    "dpo": DPO(beta=0.5, anchor=0.3),
    "dft": DFT(),
    "kto": KTO(beta=0.5, undesirable_weight=0.7),
    "reward_model": RewardModel(),
    "valued": Valued(),
}
"""One of each kind: what is read of a model differs in all of them."""


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    """An objective of every kind."""
    return OBJECTIVES[request.param]


@pytest.fixture
def made():
    """`group`, `pairs` and `budgeted` for tests that cannot import a conftest."""
    from types import SimpleNamespace

    return SimpleNamespace(group=group, pairs=pairs, budgeted=budgeted)
