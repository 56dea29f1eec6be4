"""Which objective repairs a model: each candidate trains briefly on the same groups, and the validation split says which did best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from fiducial.app.measure import tally, trials
from fiducial.app.summary import Candidate, Tally
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.intervals import difference
from fiducial.core.records import Attempt, Group, digest
from fiducial.core.roles import Objective
from fiducial.core.store import Lines

if TYPE_CHECKING:
    from fiducial.app.loop import Loop
    from fiducial.models.local import LocalModel

GOALS = 20
"""Validation goals that each trial model is asked, with as many twins and ordinary prompts."""


def choose(loop: Loop, base: LocalModel, groups: Sequence[Group]) -> tuple[Candidate, ...]:
    """The candidates with what they were measured at, one of them chosen: least harmful compliance plus benign refusal, the first on a tie."""
    paired = sorted((g for g in groups if len(g.completions) > 1), key=lambda g: digest(g.id))[: loop.options.pilot_steps * loop.options.train.batch]
    if not paired:
        raise ConfigError(
            f"{loop.maker.name} made no preferences to choose an objective by", hint="name one that learns from demonstrations: objective=align/sft"
        )
    tried = [_tried(loop, base, paired, name, rate) for name, rate in loop.options.candidates.items()]
    best = min(range(len(tried)), key=lambda i: (tried[i].badness, i))
    return tuple(each.model_copy(update={"chosen": i == best}) for i, each in enumerate(tried))


def why(candidates: Sequence[Candidate]) -> str:
    """The reason in a sentence."""
    chosen = next(c for c in candidates if c.chosen)
    told = "; ".join(f"{c.objective} {c.compliance.rate} and {c.refusal.rate}" for c in candidates)
    alike = [c.objective for c in candidates if c is not chosen and _alike(c.compliance, chosen.compliance) and _alike(c.refusal, chosen.refusal)]
    doubt = f" Of so few prompts it cannot be told apart from {', '.join(alike)}." if alike else ""
    return (
        f"{chosen.objective} was chosen: after {chosen.steps} trial steps on the same {chosen.groups} groups, harmful compliance and benign refusal "
        f"on validation prompts were {told}, and its sum is the lowest.{doubt}"
    )


def _alike(one: Tally, other: Tally) -> bool:
    """Whether the interval of the difference of two rates holds 0."""
    _, low, high = difference(one.rate, other.rate)
    return low <= 0 <= high


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
        harmful = tally(attempts, lambda a: a.prompt.expected == "refuse")
        benign = tally(attempts, lambda a: a.prompt.expected != "refuse")
        found = Candidate(objective=name, learning_rate=rate, steps=result.steps, groups=result.groups, compliance=harmful, refusal=benign)
        stage.finish(found.model_dump(mode="json") | {"seconds": time.monotonic() - began})
        checkpoint.clear(state)
    loop.seconds[f"trying {name}"] = stage.result["seconds"]
    return Candidate.model_validate({k: v for k, v in stage.result.items() if k != "seconds"})


def _asked(loop: Loop, policy: LocalModel, kept: Lines[Attempt], name: str) -> list[Attempt]:
    some = loop.material["validation"].first(GOALS)
    prompts = [*some.goals, *some.twins, *some.ordinary[:GOALS]]
    plan = [(loop.direct, prompts)]
    kept.path.unlink(missing_ok=True)  # the model they were made with is trained anew after an interruption
    return trials(policy, plan, loop.judge, kept, seed=loop.options.seed, max_tokens=loop.options.max_tokens, progress=loop.progress, name=f"measuring {name}")
