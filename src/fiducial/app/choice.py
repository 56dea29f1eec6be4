"""Which objective repairs a model: each candidate trains briefly on the same groups, and validation prompts say which did best against the base model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from fiducial.app.measure import tally, trials
from fiducial.app.summary import Candidate
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.intervals import mcnemar
from fiducial.core.records import Attempt, Group, Prompt, digest
from fiducial.core.roles import Objective
from fiducial.core.run import Stage
from fiducial.core.store import Lines

if TYPE_CHECKING:
    from fiducial.app.loop import Loop
    from fiducial.models.local import LocalModel

GOALS = 40
"""Validation goals that each trial model is asked, with as many twins and ordinary prompts."""
CHANCE = 0.05
"""Two models are told apart where the exact test gives less."""


def choose(loop: Loop, base: LocalModel, groups: Sequence[Group]) -> tuple[Candidate, ...]:
    """The base model and the candidates with what they were measured at, one of them chosen: least harmful compliance plus benign refusal, the first on
    a tie."""
    paired = _paired(loop, groups)
    if not paired:
        raise ConfigError(
            f"{loop.maker.name} made no preferences to choose an objective by", hint="name one that learns from demonstrations: objective=align/sft"
        )
    tried = [_tried(loop, base, paired, name, rate) for name, rate in loop.options.candidates.items()]
    best = min(range(len(tried)), key=lambda i: (tried[i].badness, i))
    return (_untrained(loop), *(each.model_copy(update={"chosen": i == best}) for i, each in enumerate(tried)))


def _paired(loop: Loop, groups: Sequence[Group]) -> list[Group]:
    """Pairs to try candidates on, chosen by hash; those of prompts without an attack, as far as there are such: they are short, and make more steps."""
    pairs = sorted((g for g in groups if len(g.completions) > 1), key=lambda g: digest(g.id))
    plain = {p.id for p in loop.material["repair"].direct}
    return ([g for g in pairs if g.prompt.id in plain] or pairs)[: loop.options.pilot_steps * loop.options.train.batch]


def why(candidates: Sequence[Candidate]) -> str:
    """The reason in a sentence."""
    base, *tried = candidates
    chosen = next(c for c in tried if c.chosen)
    told = "; ".join(f"{c.objective} {c.compliance.rate} and {c.refusal.rate}" for c in candidates)
    others = [c for c in tried if c is not chosen]
    if all(_alike(c, base) for c in tried):
        reason = f"no candidate can be told apart from the base model on so few prompts, and {chosen.objective} has the lowest sum or stands first"
    else:
        alike = [c.objective for c in others if _alike(c, chosen)]
        reason = "its sum is the lowest" + (f", though by so little that it cannot be told apart from {', '.join(alike)}" if alike else "")
    return (
        f"{chosen.objective} was chosen: after {chosen.steps} trial steps on the same {chosen.groups} groups, harmful compliance and refusals of harmless "
        f"prompts were {told} on the same validation prompts; {reason}."
    )


def _alike(one: Candidate, other: Candidate) -> bool:
    """Whether two models fail at different prompts no oftener than chance would have it, by the exact test of McNemar."""
    pairs = list(zip(one.failed, other.failed, strict=True))
    return mcnemar(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)) >= CHANCE


def _untrained(loop: Loop) -> Candidate:
    """The base model on the same prompts, which it was asked before anything was trained."""
    answered = {a.prompt.id: a for a in loop.untrained if a.attack == loop.direct.name}
    return _measured([answered[p.id] for p in _prompts(loop)], objective="base model")


def _tried(loop: Loop, base: LocalModel, groups: Sequence[Group], name: str, rate: float | None) -> Candidate:
    """One candidate's short training and measurement; not done again after an interruption."""
    from fiducial.training import checkpoint
    from fiducial.training.loop import train

    objective = cast(Objective, registry.create(name))
    options = loop.options.train.model_copy(update={"epochs": 1.0, "learning_rate": rate, "seed": loop.options.seed})
    inputs = {"groups": digest([g.id for g in groups]), "model": base.fingerprint, "options": options, "objective": {"name": name} | objective.options()}
    stage = loop.run.stage(f"choose-{name.rpartition('/')[2]}", inputs)
    if not stage.done:
        began = time.monotonic()
        policy = loop.copied(base)
        state, tables = stage.folder("state"), loop.run.path / "tables"
        with loop.progress.task(f"trying {name}", loop.options.pilot_steps) as task:
            result = train(policy, groups, objective, options, folder=state, tables=tables, report=lambda *_: task.advance(1))
        attempts = _asked(loop, policy, stage.lines("attempts", Attempt), name)
        found = _measured(attempts, objective=name, learning_rate=rate, steps=result.steps, groups=result.groups)
        stage.finish(found.model_dump(mode="json") | {"seconds": time.monotonic() - began})
        checkpoint.clear(state)
    return _known(loop, stage, name)


def _known(loop: Loop, stage: Stage, name: str) -> Candidate:
    """What a finished stage found."""
    loop.seconds[f"trying {name}"] = stage.result["seconds"]
    return Candidate.model_validate({k: v for k, v in stage.result.items() if k != "seconds"})


def _measured(attempts: Sequence[Attempt], **about: Any) -> Candidate:
    """What could not be scored counts as failed."""
    harmful, benign = (tally(attempts, lambda a, refuse=refuse: (a.prompt.expected == "refuse") == refuse) for refuse in (True, False))
    return Candidate(**about, compliance=harmful, refusal=benign, failed=tuple(a.failed or not a.scored for a in attempts))


def _prompts(loop: Loop) -> list[Prompt]:
    some = loop.validation().first(GOALS)
    return [*some.goals, *some.twins, *some.ordinary[:GOALS]]


def _asked(loop: Loop, policy: LocalModel, kept: Lines[Attempt], name: str) -> list[Attempt]:
    plan = [(loop.direct, _prompts(loop))]
    kept.path.unlink(missing_ok=True)  # the model they were made with is trained anew after an interruption
    return trials(policy, plan, loop.judge, kept, seed=loop.options.seed, max_tokens=loop.options.max_tokens, progress=loop.progress, name=f"measuring {name}")
