"""What is to be learnt from one's own samples, and whether it fits together with the objective, the options and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fiducial.core.config import refuse_idle
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Group, Prompt
from fiducial.core.roles import Objective, Reward
from fiducial.models.local import LocalModel
from fiducial.training import samples
from fiducial.training.constraint import Multiplier
from fiducial.training.online_card import Bounds
from fiducial.training.online_options import OnlineOptions
from fiducial.training.options import TrainOptions
from fiducial.training.policy_gradient import SampledObjective
from fiducial.training.rewards import Mixture

UNUSED = ("from_scratch", "sizes", "learn", "neftune", "watch_every", "held_out")
"""Options of training that mean nothing here."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be learnt from."""

    prompts: Sequence[Prompt]
    rewards: Mixture
    cost: Reward | None = None
    """A reward whose higher values are worse, to be kept below the limit of `multiplier`."""
    multiplier: Multiplier = field(default_factory=Multiplier)
    demonstrations: Sequence[Group] = ()
    """Groups whose preferred completions are imitated besides."""

    def __post_init__(self) -> None:
        """Raises MethodError for a cost that is not proved to mean anything; rewards are asked when they are put together."""
        if self.cost:
            self.cost.refuse_unproven()


def bounds(task: Task, online: OnlineOptions) -> Bounds:
    """What a run with these options is held to."""
    return Bounds(online.kl_budget, online.length_change, tuple(p.label for p in task.rewards.parts if not p.weight))


def spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """All prompts in an order decided by their hashes, of which every beginning has each kind of `expected` in about its share, and at least one of it."""
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda p: p.id):
        by_kind.setdefault(prompt.expected, []).append(prompt)
    placed = [(at / len(some), prompt.id, prompt) for some in by_kind.values() for at, prompt in enumerate(some)]
    return [prompt for *_, prompt in sorted(placed, key=lambda each: each[:2])]


def check(task: Task, objective: Objective, options: TrainOptions, online: OnlineOptions) -> None:
    """Raises ConfigError for options that do not fit together, DataError where there are no prompts."""
    sampled = isinstance(objective, SampledObjective)
    if not task.prompts:
        raise DataError("there are no prompts to learn from", hint="give at least one")
    for name in UNUSED:
        if getattr(options, name) != TrainOptions.model_fields[name].default:
            raise ConfigError(f"{name} says nothing to a model that learns from its own samples", hint=f"leave out {name}")
    least = max(objective.least, 2) if labelled(objective) else objective.least  # the better one of a single answer is unknown
    if online.k < least:
        raise ConfigError(f"{objective.name} compares answers, but k is {online.k}", hint=f"draw at least {least} answers to each prompt")
    if not sampled and set(objective.reads) - {"tokens"}:
        raise ConfigError(f"{objective.name} cannot learn from samples of the policy", hint="use align/grpo, align/rloo, align/ppo, or an objective over pairs")
    if objective.controlled:
        raise ConfigError(f"{objective.name} marks text that it is given, not samples of the policy", hint="give --data FILE")
    if not sampled and (online.kl_target is not None or task.demonstrations):
        raise ConfigError(f"{objective.name} has no KL term to move and takes no demonstrations besides", hint="leave out kl_target and demonstrations")
    if isinstance(objective, SampledObjective) and online.kl_target is not None and not objective.beta:
        raise ConfigError("kl_target moves beta by shares of it, but beta is 0", hint="give a beta to start from")
    if online.kl_target is None:
        refuse_idle(online, ["kl_horizon"], when="without kl_target", hint="leave it out, or give kl_target")
    if not task.demonstrations:
        refuse_idle(online, ["mix"], when="without demonstrations", hint="leave it out, or give demonstrations")


def fitting(model: LocalModel, task: Task, options: TrainOptions, online: OnlineOptions) -> Task:
    """The task without prompts and demonstrations that are too long. Raises DataError when none is left."""
    limit = min(options.max_length, model.context)
    prompts = [p for p in task.prompts if len(model.encode(p.messages)[0]) <= limit - online.max_tokens]
    if not prompts:
        raise DataError(f"none of {len(task.prompts)} prompts fits with its answers", hint="raise max_length, or shorten prompts or max_tokens")
    shown = samples.imitable(model, task.demonstrations, max_length=limit)
    if task.demonstrations and not shown:
        raise DataError(f"none of {len(task.demonstrations)} demonstrations can be imitated", hint="each needs an answer and must fit into max_length")
    return replace(task, prompts=prompts, demonstrations=shown)


def valued(objective: Objective) -> bool:
    """Whether it learns from single answers by what each is worth: it reads the `value` of tokens, and compares nothing."""
    single = objective.least == 1 and not objective.per_token
    return single and "tokens" in objective.reads and "prompt" not in objective.reads and not isinstance(objective, SampledObjective)


def labelled(objective: Objective) -> bool:
    """Whether it is told which answer is the best."""
    return not isinstance(objective, SampledObjective) and not valued(objective)
