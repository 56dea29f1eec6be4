"""What holds for every loss that there is: the order of completions does not matter, and far out nothing overflows."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout
from fiducial.training.policy_gradient import SampledObjective

TARGETS, REWARDS = {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 0.25, "b": -0.5, "c": 1.0}
VALUES, LENGTHS = {"a": 1.0, "b": 0.25, "c": 0.75}, {"a": 2, "b": 4, "c": 1}
"""Of the only part of each completion; and its tokens."""


def variants():
    """Every objective with every choice among words that it accepts."""
    for card in registry.methods().values():
        if card.role != "Objective":
            continue
        hints = get_type_hints(registry.load(card.name))
        words = {o.name: get_args(hints[o.name]) for o in card.options if get_origin(hints[o.name]) is Literal}
        for values in product(*words.values()):
            setting = dict(zip(words, values, strict=True))
            try:
                registry.create(card.name, setting)
            except ConfigError:
                continue
            yield pytest.param(card.name, setting, id="-".join([card.name.partition("/")[2], *map(str, values)]))


VARIANTS = list(variants())


def completions(objective):
    """As many as it takes, three at most."""
    return "abc"[: objective.most]


def drawn():
    """What a model says of each completion: log-probabilities and values of its tokens, now and before, and a score."""
    random = torch.Generator().manual_seed(1)

    def one(length):
        policy, reference = (-2 * torch.rand(length, generator=random) for _ in range(2))
        old = policy + 0.02 * torch.randn(length, generator=random)  # so near that no clip acts
        return SimpleNamespace(
            policy=policy, reference=reference, old=old, values=torch.randn(length, generator=random), score=torch.randn((), generator=random)
        )

    return {name: one(length) for name, length in LENGTHS.items()}


def evaluated(objective, order, facts):
    """Loss of one group with its completions in this order; the gradient with respect to all that is said of each, by its name."""
    given = Group(
        prompt=Prompt(messages=user("?")),
        completions=tuple(Completion(text=name, ends=(1,), values=(VALUES[name],)) for name in order),
        targets=tuple(TARGETS[name] / sum(TARGETS[n] for n in order) for name in order),
        rewards=tuple(REWARDS[name] for name in order),
    )
    group = objective.prepare(given)
    names = [c.text[-1] for c in group.completions]
    parts = layout([group], [[LENGTHS[name] for name in names]], {})
    value = parts.spread(parts.rewards)

    def flat(what):
        return torch.cat([getattr(facts[name], what) for name in names])

    answer = (parts.tokens.position == parts.spread(parts.length) - 1).float()  # the last token, where prompts are read too
    parts = replace(parts, tokens=replace(parts.tokens, given={"value": value, "answer": answer, "old": flat("old")}))
    if isinstance(objective, SampledObjective):
        lessons = objective.lessons(parts.with_tokens(flat("old"), flat("values") + 0.1), parts.with_tokens(flat("reference")), room=5)
        parts = replace(parts, tokens=replace(parts.tokens, given=dict(lessons.given) | {"old": flat("old")}))
    leaves = [t.clone().requires_grad_() for t in (flat("policy"), flat("values"), torch.stack([facts[name].score for name in names]))]
    mismatched = torch.tensor([-1.0, -3.0])
    policy = replace(parts.with_tokens(*leaves[:2]), scores=leaves[2].unsqueeze(0), mismatched=mismatched)
    loss = objective(policy, replace(parts.with_tokens(flat("reference")), mismatched=mismatched - 0.1) if objective.needs_reference else None).sum()
    pulls = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    sizes = [LENGTHS[name] for name in names]
    per_token = [pull.split(sizes) for pull in pulls[:2]]
    return loss.detach(), {name: torch.cat([per_token[0][i], per_token[1][i], pulls[2][i : i + 1]]) for i, name in enumerate(names)}


@pytest.mark.parametrize(("name", "setting"), VARIANTS)
def test_completions_in_another_order_with_their_labels_change_nothing(name, setting):
    objective, facts = registry.create(name, setting), drawn()
    order = completions(objective)
    (loss, pulls), (again, other) = (evaluated(objective, o, facts) for o in (order, order[::-1]))
    assert float(again) == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    assert pulls.keys() == other.keys()
    assert any(pull.abs().sum() > 0 for pull in pulls.values())
    for each, pull in pulls.items():
        assert torch.allclose(pull, other[each], rtol=1e-3, atol=1e-6), each


@pytest.mark.parametrize("far", [50.0, 500.0, 50_000.0])
@pytest.mark.parametrize(("name", "setting"), VARIANTS)
def test_far_out_loss_and_gradient_are_numbers(name, setting, far):
    """Each token of a completion is this many nats less likely under the policy, the reference or when it was drawn; and heads are as far out."""
    objective = registry.create(name, setting)
    order = completions(objective)
    places = [(one, what, sign) for one in order for what in ("policy", "reference", "old", "values", "score") for sign in (-1, 1)]
    for one, what, sign in places:
        if sign == 1 and what in ("policy", "reference", "old"):
            continue  # a probability above 1
        facts = drawn()
        setattr(facts[one], what, getattr(facts[one], what) + sign * far)
        loss, pulls = evaluated(objective, order, facts)
        assert loss.isfinite(), (one, what)
        assert all(pull.isfinite().all() for pull in pulls.values()), (one, what)
