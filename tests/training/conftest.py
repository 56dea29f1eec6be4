"""Groups a tiny model can be trained on in milliseconds, and models with a chosen row budget."""

from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import ClassVar

import pytest

from fiducial.align.dft import DFT
from fiducial.align.dpo import DPO
from fiducial.align.kto import KTO
from fiducial.align.orpo import ORPO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.roles import Objective


def group(number, *texts, **fields):
    """A group with unequal lengths, so that a wrong normalisation shows."""
    texts = texts or ("no" + "o" * (3 * number), "yes, " + "e" * (number + 1))
    return Group(prompt=Prompt(messages=user(f"question {number}")), completions=tuple(Completion(text=t) for t in texts), **fields)


def pairs(count=8):
    return [group(n) for n in range(count)]


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
    "orpo": ORPO(mean="token"),
    "reward_model": RewardModel(),
    "valued": Valued(),
}
"""One of each kind: what is read of a model differs in all of them."""


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    """An objective of every kind."""
    return OBJECTIVES[request.param]


@pytest.fixture(scope="session")
def trainers():
    """The script trainers.py as a module."""
    spec = spec_from_file_location("trainers", Path(__file__).with_name("trainers.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(trainers):
    """`group`, `pairs` and `budgeted` for tests that cannot import a conftest."""
    from types import SimpleNamespace

    return SimpleNamespace(group=group, pairs=pairs, budgeted=trainers.budgeted)
