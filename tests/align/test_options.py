"""Every option of every objective reaches the loss or its gradient, or is refused where it would do nothing."""

from dataclasses import replace
from itertools import product
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout
from fiducial.training.policy_gradient import SampledObjective

CARDS = [card for card in registry.methods().values() if card.role == "Objective"]
OPTIONS = [pytest.param(card, option, id=f"{card.name}-{option.name}") for card in CARDS for option in card.options]


def choices(card, option):
    """The values of a Literal option; empty for others."""
    hint = get_type_hints(registry.load(card.name))[option.name]
    return get_args(hint) if get_origin(hint) is Literal else ()


def others(card, option):
    """Values that are not the default."""
    if option.type == "bool":
        return [not option.default]
    if option.type == "int":
        return [option.default + 1]
    if option.type == "float":
        return [2 * option.default, option.default / 2] if option.default else [0.25]
    return [value for value in choices(card, option) if value != option.default]


def data(objective):
    """16 random pairs with soft labels and rewards, as the objective wants them, and everything that may be known of their tokens."""
    random = torch.Generator().manual_seed(0)
    first, rewards = torch.rand(16, generator=random).tolist(), torch.randn(16, 2, generator=random).tolist()
    completions = (Completion(text="a"), Completion(text="b"))
    groups = [
        Group(prompt=Prompt(messages=user(f"{n}")), completions=completions, targets=(p, 1 - p), rewards=tuple(r))
        for n, (p, r) in enumerate(zip(first, rewards, strict=True))
    ]
    groups = [group for group in map(objective.prepare, groups) if len(group.completions) >= objective.least]
    lengths = [torch.randint(1, 9, (len(group.completions),), generator=random).tolist() for group in groups]
    count = sum(map(sum, lengths))
    last = torch.tensor([float(i == length - 1) for sizes in lengths for length in sizes for i in range(length)])  # the answer, where prompts are read too
    parts = layout(groups, lengths, {"value": torch.randn(count, generator=random), "answer": last})
    noise = [0.3 * torch.randn(count, generator=random) for _ in range(4)]
    return parts, -1.5 + noise[0], -1.5 + noise[1], noise[2:], torch.randn(parts.mask.shape, generator=random)


def prepared(objective):
    """What many groups become, which is where options about data act."""
    completions = (Completion(text="a"), Completion(text="b"))
    return [objective.prepare(Group(prompt=Prompt(messages=user(f"{n}")), completions=completions, rewards=(n / 500 - 0.5, 0.0))) for n in range(500)]


def figures(objective):
    """Losses, what each group counts, and the gradient with respect to all that a model gives, one after the other."""
    parts, policy, reference, values, scores = data(objective)
    if isinstance(objective, SampledObjective):
        lessons = objective.lessons(parts.with_tokens(policy + 3 * values[0], values[1]), parts.with_tokens(reference), room=10)
        parts = replace(parts, tokens=replace(parts.tokens, given=dict(lessons.given) | {"old": policy + 3 * values[0]}))
    known = [t.clone().requires_grad_() for t in (policy, values[0], scores)]
    groups = replace(parts.with_tokens(*known[:2]), scores=known[2], mismatched=values[1][:16] + 1)
    losses = objective(groups, replace(parts.with_tokens(reference), mismatched=values[0][:16]) if objective.needs_reference else None)
    gradients = torch.autograd.grad(losses.sum(), known, allow_unused=True, materialize_grads=True)
    return torch.cat([losses.detach(), objective.size(parts), *(g.flatten() for g in gradients)])


@pytest.mark.parametrize(("card", "option"), OPTIONS)
def test_an_option_changes_the_loss_or_is_refused(card, option):
    assert others(card, option), f"this test knows no other value of the type {option.type}"
    switches = [o for o in card.options if choices(card, o) and o.name != option.name]
    changed = 0
    for values in product(*(choices(card, o) for o in switches)):
        setting = {o.name: value for o, value in zip(switches, values, strict=True)}
        for value in others(card, option):
            try:
                one, other = registry.create(card.name, setting), registry.create(card.name, setting | {option.name: value})
            except ConfigError:
                continue
            does = not torch.equal(figures(one), figures(other)) or prepared(one) != prepared(other)
            assert does, f"{option.name}={value} does nothing with {setting}"
            changed += 1
    assert changed, "it is refused whatever the other options are"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_same_options_give_the_same_figures(card):
    found = figures(registry.create(card.name))
    assert found.isfinite().all()
    assert torch.equal(found, figures(registry.create(card.name)))
