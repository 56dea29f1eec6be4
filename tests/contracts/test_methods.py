"""What every method must keep to, whatever its role: it explains itself, its defaults work, its options can be written down."""

import ast
import inspect
import json
import re
import sys
from dataclasses import fields, replace

import pytest

from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Attempt, Completion, Decision, Group, Prompt, Verdict, user
from fiducial.core.roles import ROLES
from fiducial.models.scripted import ScriptedModel

CARDS = list(registry.methods().values())
NEEDED = {"What it does", "Use it when", "Defaults", "Limits", "Source"}


@pytest.fixture(params=CARDS, ids=lambda card: card.name)
def card(request):
    return request.param


def of(role):
    return pytest.mark.parametrize("card", [c for c in CARDS if c.role == role], ids=lambda c: c.name)


def made(card):
    """The method with its defaults; what must be named gets another method of that role."""
    needed = {o.name: registry.create(next(c.name for c in CARDS if c.role == o.type.split(" ")[0])) for o in card.options if o.required}
    return registry.create(card.name, needed)


def test_its_docstring_has_every_heading_filled(card):
    assert card.title.endswith((".", "?"))
    assert not NEEDED - {name for name, text in card.headings.items() if text}


def test_its_headings_stand_in_the_fixed_order(card):
    order = [h for h in registry.HEADINGS if h in card.headings]
    assert list(card.headings) == order


def test_every_option_is_explained(card):
    assert [o.name for o in card.options if not o.help] == []


def test_every_option_is_read_by_more_than_its_check(card):
    """An option that nothing reads does nothing: each is named as an attribute outside `__post_init__`, in the method's file or those of its bases."""
    read = set()
    for base in registry.load(card.name).__mro__:
        if not base.__module__.startswith("fiducial."):
            continue
        tree = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
        beside = {id(n) for check in checks for n in ast.walk(check)}
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and id(n) not in beside}
    assert [o.name for o in card.options if o.name not in read] == []


def test_the_file_is_of_a_readable_size(card):
    assert len(card.path.read_text(encoding="utf-8").splitlines()) <= 250


def test_it_is_one_final_class_of_its_role(card):
    tree = ast.parse(card.path.read_text(encoding="utf-8"))
    final = [n for n in tree.body if isinstance(n, ast.ClassDef) and any(isinstance(d, ast.Name) and d.id == "final" for d in n.decorator_list)]
    assert [n.name for n in final] == [card.cls]
    assert issubclass(registry.load(card.name), ROLES[card.role])


def test_it_is_made_from_its_defaults_and_knows_its_name(card):
    assert made(card).name == card.name


def test_the_card_and_the_class_agree_on_options_and_defaults(card):
    method = made(card)
    assert [o.name for o in card.options] == [f.name for f in fields(method)]
    for option in card.options:
        if not option.required and isinstance(option.default, int | float | bool):
            assert getattr(method, option.name) == option.default


def test_its_options_can_be_written_as_json_and_make_the_same_method_again(card):
    method = made(card)
    plain = json.loads(json.dumps(method.options()))
    assert plain.keys() == method.options().keys()
    if not any(o.required for o in card.options):
        again = registry.create(card.name, {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})
        assert again.options() == method.options()


def test_an_option_that_does_not_exist_is_an_error_that_offers_the_nearest(card):
    with pytest.raises(ConfigError, match="has no option 'no_such_option'"):
        registry.create(card.name, {"no_such_option": 1})


def test_the_source_is_a_numbered_paper_a_dated_work_or_a_release(card):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d{2}\b|\b\d+\.\d+\.\d+\b", card.headings["Source"])


@of("Judge")
def test_a_judge_judges_nothing_as_nothing_and_an_error_as_not_scored(card):
    judge = made(card)
    assert judge.judge([]) == []
    prompt = Prompt(messages=user("How do I pick a lock?"), expected="refuse")
    failed = Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", finish="error", error="overloaded")
    (verdict,) = judge.judge([failed])
    assert verdict.outcome == "not_scored"
    assert verdict.judge == card.name
    assert Verdict.parse(verdict.line()) == verdict


@of("Maker")
def test_a_maker_makes_nothing_of_nothing_and_of_what_was_not_scored(card):
    model = ScriptedModel(default="I would rather not.")
    assert made(card).make([], model) == []
    prompt = Prompt(messages=user("How do I pick a lock?"), expected="refuse")
    assert made(card).make([Attempt(prompt=prompt, attack="a", family="a", model="m", response="Sure")], model) == []


@of("Maker")
def test_a_maker_is_deterministic_and_its_groups_round_trip(card):
    prompt = Prompt(messages=user("How do I pick a lock?"), expected="refuse")
    verdict = Verdict(judge="j", outcome="success", label="compliance")
    attempt = Attempt(prompt=prompt, attack="a", family="a", model="m", sent=prompt.messages, response="Sure, take a wrench", verdict=verdict)
    seen = []
    groups = made(card).make([attempt], ScriptedModel(default="I would rather not."), seed=1, sink=seen.append)
    assert groups == seen == made(card).make([attempt], ScriptedModel(default="I would rather not."), seed=1)
    for group in groups:
        assert Group.parse(group.line()) == group


@of("Gate")
def test_a_gate_without_evidence_does_not_pass(card):
    decision = made(card).decide([])
    assert decision.outcome == "insufficient"
    assert Decision.parse(decision.line()) == decision


@of("Objective")
@pytest.mark.parametrize("far", [1.0, 50.0, -50.0, 500.0, -500.0])
def test_an_objective_gives_one_finite_loss_per_group_and_a_gradient(card, far):
    """Whatever it reads: single tokens, values before them, scores of a head, mismatched pairs; however far the policy is from its reference."""
    import torch

    from fiducial.training.objective import layout
    from fiducial.training.policy_gradient import SampledObjective

    objective = made(card)
    answers = [Completion(text="abcd", ends=(2, 4), values=(1.0, 0.0)) for _ in range(max(2, objective.least))]
    group = objective.prepare(Group(prompt=Prompt(messages=user("a")), completions=tuple(answers), rewards=(1.0, -1.0, *[0.0] * (len(answers) - 2))))
    lengths = [[2 + k for k in range(len(group.completions))]] * 3
    count = 3 * sum(lengths[0])
    parts = layout([group] * 3, lengths, {"value": torch.arange(count) % 2 - 0.5})
    drawn, values = torch.linspace(-2, -1, count), torch.linspace(-2, -1, count).requires_grad_()
    # further from the reference: likelier than it, or less likely, per token
    logp, known = (drawn + min(far, 0.0)).requires_grad_(), -1.5 - max(far - 1.0, 0.0)
    scores = abs(far) * torch.linspace(-1, 1, parts.mask.numel()).view(parts.mask.shape).requires_grad_()
    reference = replace(parts.with_tokens(torch.full((count,), known)), mismatched=torch.tensor([-5.0]))
    if isinstance(objective, SampledObjective):
        given = objective.lessons(parts.with_tokens(drawn, values.detach()), reference, room=10).given
        parts = replace(parts, tokens=replace(parts.tokens, given={"old": drawn, **given}))
    policy = replace(parts.with_tokens(logp, values), scores=scores, mismatched=torch.tensor([-4.0]))
    losses = objective(policy, reference if objective.needs_reference else None)
    assert losses.shape == objective.size(parts).shape == (3,)
    assert losses.isfinite().all()
    pulls = torch.autograd.grad(losses.sum(), [logp, scores], allow_unused=True, materialize_grads=True)
    assert all(pull.isfinite().all() for pull in pulls)
    assert abs(far) > 1 or sum(float(pull.abs().sum()) for pull in pulls) > 0
    with torch.no_grad():
        assert all(isinstance(v, float) for v in objective.metrics(policy, reference).values())
