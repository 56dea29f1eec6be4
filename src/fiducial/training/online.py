"""The outer loop of learning from one's own samples: draw, score, learn a little, look, repeat.

Each step draws K answers to some prompts from the model as it is, token by token what is then trained on; scores them with one or more
rewards; and makes one or more updates on them with the machinery of the one training loop. Policy-gradient objectives take the answers
with their advantages; objectives over pairs and groups (align/dpo, align/exo, align/sft, ...) take them as labelled groups, which is
online preference optimisation; those that value single answers (align/rwr, align/unlikelihood) take them with their rewards. The reference
is the model as it was when the run began.

Every step's samples are fresh, so distance is measured on them. Length and repetition are compared on the same prompts, which are looked at again
whenever ten times as many answers were learnt from: other prompts have other answers.
A run that is killed goes on from its last checkpoint with the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Group, digest
from fiducial.core.roles import Objective, Sink, ignore
from fiducial.models import adapters
from fiducial.models.local import LocalModel
from fiducial.training import lora, samples, sharding
from fiducial.training.constraint import balanced
from fiducial.training.data import Data
from fiducial.training.front import Front, Point
from fiducial.training.kl import Pull, k3
from fiducial.training.loop import Report, batch, has_added, planned_steps
from fiducial.training.objective import GroupLogProbs
from fiducial.training.online_card import Look, stops, surface
from fiducial.training.online_options import OnlineOptions
from fiducial.training.online_sampling import LOOKED_AT, Sampling, Scored
from fiducial.training.online_task import Task, bounds, check, fitting, labelled, valued
from fiducial.training.options import TrainOptions
from fiducial.training.policy_gradient import SampledObjective
from fiducial.training.processes import accelerator_on, agreed
from fiducial.training.rewards import Mixture, Scale, mean
from fiducial.training.schedule import exploded, rate
from fiducial.training.updates import Updates
from fiducial.training.weights import refuse_float16

BETWEEN_LOOKS = 10
"""Answers that are learnt from for each one of a look."""
STATE = ("step", "seconds", "answers", "left_out", "stop", "history", "seen")
"""What of a run is kept in its checkpoints under the same name."""


@dataclass(frozen=True, slots=True)
class OnlineResult:
    """What came of a run. `stop` is empty when all steps were made."""

    steps: int
    planned: int
    prompts: int
    """Prompts that fit with their answers; longer ones were left out."""
    demonstrations: int
    """Demonstrations that could be imitated; longer ones and those without an answer were left out."""
    answers: int
    """Answers drawn for training."""
    left_out: int
    """Answers that taught nothing: not scored, or with nothing to be compared with."""
    tokens: int
    """Tokens the network saw in updates, shared ones once."""
    naive_tokens: int
    seconds: float
    stop: str
    before: Look
    after: Look
    history: list[dict[str, float]] = field(default_factory=list)
    best: Point | None = None
    """Under a cost limit, the checkpoint whose weights the model has now."""


def learn(
    model: LocalModel,
    task: Task,
    objective: Objective,
    options: TrainOptions,
    online: OnlineOptions,
    *,
    folder: Path,
    report: Report | None = None,
    sink: Sink = ignore,
) -> OnlineResult:
    """Trains `model` in place on what it says to the prompts, and keeps checkpoints in `folder`; `sink` is given every scored group.

    Called again after an interruption with the same arguments it goes on where the last checkpoint was, with the same result as if
    nothing had happened; groups of repeated steps go to `sink` again, equal to those before. Raises ConfigError for options that do not
    fit together, DataError when a reward cannot score anything, FiducialError when the loss is no longer a number.
    """
    check(task, objective, options, online)
    accelerator = accelerator_on(model.device)
    folder = agreed(accelerator, folder)
    if sharding.wanted(accelerator):
        raise ConfigError("a model whose weights are shared out cannot be sampled from while it learns", hint="learn from rewards without FSDP")
    refuse_float16(model.module)
    lora.refuse_ignored(model.module, options)
    task = fitting(model, task, options, online)
    adapted, added = adapters.is_adapted(model.module), has_added(model, folder)
    # below a new adapter lie frozen weights; others train themselves, and the run is held to them as they are now
    fresh = bool(options.lora_rank) and (added or not adapted)
    origin = lora.base_fingerprint(model.module) if fresh else model.fingerprint
    if fresh and not added:
        model.module = lora.attach(model.module, rank=options.lora_rank, depth=options.lora_depth, seed=options.seed)
    lora.make_trainable(model.module)
    costed = task.cost is not None and isinstance(objective, SampledObjective) and objective.values_cost
    updates = Updates(model, objective, options, accelerator, temperature=online.temperature, costed=costed)
    sampling = Sampling(updates, task, online, samples.Start(model, updates.trainables, fresh=fresh))
    return _Online(updates, task, online, sampling, folder, origin).run(report, sink)


class _Online:
    """One run: the state that changes, and a method per part of a step."""

    def __init__(self, updates: Updates, task: Task, online: OnlineOptions, sampling: Sampling, folder: Path, origin: str) -> None:
        self.updates, self.task, self.online, self.sampling, self.folder, self.origin = updates, task, online, sampling, folder, origin
        self.model, self.options, self.accelerator = updates.model, updates.options, updates.accelerator
        self.planned = planned_steps(len(task.prompts), self.options)
        self.sampled = updates.objective if isinstance(updates.objective, SampledObjective) else None
        self.rounds = online.updates or (self.sampled.updates if self.sampled else 1)
        self.identity = self._identity()  # before the weight of the KL term moves
        self.pull = Pull(self.sampled.beta if self.sampled else 0.0, online.kl_target, online.kl_horizon)
        self.multiplier = task.multiplier
        self.bounds = bounds(task, online)
        self.every = math.ceil(BETWEEN_LOOKS * min(LOOKED_AT, len(task.prompts)) / (self.options.batch * online.k))
        self.before: Look | None = None
        self.seen: dict[str, float] = {}
        self.step, self.seconds, self.answers, self.left_out = 0, 0.0, 0, 0
        self.stop = ""
        self.history: list[dict[str, float]] = []
        self.front = Front(folder, updates.trainables, writes=self.accelerator.is_main_process)

    def run(self, report: Report | None, sink: Sink) -> OnlineResult:
        """All steps from the last checkpoint on, until prompts end, time is up or a rule stops it, with a look before and after."""
        self._resume()
        self.before = before = self.before or self.sampling.first_look()
        stop = self.stop or agreed(self.accelerator, self._spent())
        while self.step < self.planned and not stop:
            began = time.monotonic()
            figures = self._one_step(sink)
            self.step += 1
            if self.step % self.every == 0:
                self.seen = surface(self.sampling.asked_again().groups)
            self.seconds += time.monotonic() - began
            self.history.append({"step": self.step} | figures)
            if report and self.accelerator.is_main_process:
                report(self.step, self.planned, figures)
            # at the last step there is nothing left to stop; what was seen stands in the figures
            self.stop = agreed(self.accelerator, self._broken(before) if self.step < self.planned else "")
            stop = self.stop or agreed(self.accelerator, self._spent())
            if self.step % self.options.save_every == 0 or self.step == self.planned or stop:
                self._save()
        chosen = self.front.take_best(self.multiplier.limit)
        after = self.sampling.look()
        counts = (self.answers, self.left_out, self.updates.tokens, self.updates.naive)
        used = (len(self.task.prompts), len(self.task.demonstrations))
        return OnlineResult(self.step, self.planned, *used, *counts, self.seconds, stop, before, after, self.history, chosen)

    def _one_step(self, sink: Sink) -> dict[str, float]:
        """Draws, scores, and updates; figures are over all processes."""
        chosen = batch(self.step, len(self.task.prompts), self.options)
        drawn = self.sampling.drawn([self.task.prompts[i] for i in chosen], "samples", self.step, k=self.online.k)
        scored = self.sampling.scored(drawn, self.step)
        for group in scored.groups if self.accelerator.is_main_process else ():
            sink(group)
        figures = self._figures(scored)
        learnt, answers = self._updated(scored), int(scored.drawn.parts.mask.sum())
        self.answers += answers
        self.left_out += int(learnt["left_out"])
        if self.task.cost:
            self.multiplier = self.multiplier.after([c for costs in scored.costs for c in costs if c is not None], self.step)
        self.pull = self.pull.after(figures["k3"], answers)
        return figures | learnt

    def _figures(self, scored: Scored) -> dict[str, float]:
        """What is known of a step's samples before anything is learnt from them."""
        parts, old, before = scored.drawn.parts, _logp(scored.old), _logp(scored.before)
        count = float(parts.mask.sum())
        totals = [g.rewards or () for g in scored.groups]
        found = {"reward": mean(totals)} | {f"reward.{name}": mean(values) for name, values in scored.components.items()}
        if self.task.cost:
            found |= {"cost": mean(scored.costs), "multiplier": self.multiplier.weight}
        found |= {"unscored": sum(r is None for t in totals for r in t) / count}
        found |= {"k1": float((old - before).sum()) / count, "k3": float(k3(old - before).sum()) / count, "kl_weight": self.pull.beta}
        found |= {"tokens": float(parts.length.sum()) / count, "sampler_gap": samples.sampler_gap(scored.drawn.groups, scored.old)}
        return found | surface(scored.groups)

    def _updated(self, scored: Scored) -> dict[str, float]:
        """Updates on what can be learnt from: figures of the last one, the share of groups that teach nothing, the answers left out."""
        drawn, taught = scored.drawn, self._taught(scored)
        objective = self.updates.objective
        chosen = [samples.choose(objective, i, g, contrast=labelled(objective)) for i, g in enumerate(taught)]
        picks = [pick for pick in chosen if pick is not None]
        flat, left_out = 1 - len(picks) / len(taught), int(drawn.parts.mask.sum()) - sum(len(p.completions) for p in picks)
        if not picks:
            return {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "flat_share": 1.0, "left_out": float(left_out)}
        data, at = samples.picked(drawn, picks)
        old, before = _logp(scored.old)[at], _logp(scored.before)[at]
        if valued(objective):
            data = samples.with_given(data, {"value": data.parts.spread(data.parts.rewards)})
        if self.sampled:
            if self._has_cost_critic:
                data = samples.with_costs(data, scored.costs, picks, weight=self.multiplier.weight)
            data, before, of_picked = self._lessons(data, scored.old, at, before)
            flat = 1 - (1 - of_picked) * len(picks) / len(taught)
            old = torch.cat([old, torch.zeros(len(before) - len(old))])  # of demonstrations, which no ratio is taken of
        figures: dict[str, float] = {}
        for turn in range(self.rounds):
            now = rate(self.step * self.rounds + turn, self.planned * self.rounds, self.options, self.updates.rate)
            # in the first update the policy is the one that sampled; from then on its log-probabilities then are needed
            taught_by = samples.with_given(data, {"old": old}) if turn and self.sampled else data
            figures = self.updates.step(taught_by, range(len(data.groups)), rate=now, reference=data.parts.with_tokens(before))
        return figures | {"flat_share": flat, "left_out": float(left_out)}

    @property
    def _has_cost_critic(self) -> bool:
        """Whether a critic of its own values what answers cost."""
        return self.model.cost_head is not None

    def _taught(self, scored: Scored) -> list[Group]:
        """The groups with the rewards that are learnt from: under a cost limit, of answers whose cost is known, less the weighed cost unless
        that has a critic of its own.
        """
        if not self.task.cost:
            return scored.groups
        # to a critic the rewards are as they were said, which a weight of 0 leaves them
        weight, groups = 0.0 if self._has_cost_critic else self.multiplier.weight, []
        for group, costs in zip(scored.groups, scored.costs, strict=True):
            values = tuple(balanced(r, c, weight) for r, c in zip(group.rewards or (), costs, strict=True))
            groups.append(group.model_copy(update={"rewards": values}))
        return groups

    def _lessons(self, data: Data, old: GroupLogProbs, at: Tensor, before: Tensor) -> tuple[Data, Tensor, float]:
        """The data with what each token is taught, and demonstrations mixed in; the share of its groups that teach nothing."""
        assert self.sampled is not None
        assert old.tokens is not None
        objective: Any = self.sampled  # a dataclass, as every method is
        self.sampled = self.updates.objective = replace(objective, beta=self.pull.beta)
        drawn = [read[at] for read in (old.tokens.logp, old.tokens.values, old.tokens.cost_values) if read is not None]
        taught = self.sampled.lessons(data.parts.with_tokens(*drawn), data.parts.with_tokens(before), room=self.online.max_tokens)
        flat = float(taught.flat.float().mean())
        if not (self.task.demonstrations and self.online.mix):
            return samples.with_given(data, taught.given), before, flat
        endless = self.options.model_copy(update={"epochs": 1e9})
        examples = [self.task.demonstrations[i] for i in batch(self.step, len(self.task.demonstrations), endless)]
        weight = self.online.mix * float(self.sampled.counted(data.parts).sum())
        return *samples.mixed(self.model, data, taught.given, before, examples, weight), flat

    def _broken(self, before: Look) -> str:
        """A reason to stop that the last step shows, or nothing."""
        # where all groups are flat the gradient is that of the KL term alone, beside which any reward's is large
        norms = [h["grad_norm"] for h in self.history if h["flat_share"] < 1]
        return stops(self.history, before, self.seen, self.bounds) or (exploded(norms[-1], norms[:-1]) if norms else "")

    def _spent(self) -> str:
        """A reason to stop when time is up; not kept in checkpoints, since a resumed run may be given more."""
        minutes = self.options.minutes
        spent = minutes is not None and self.seconds > 60 * minutes and self.step < self.planned
        return f"the budget of {minutes:g} minutes is spent" if spent else ""

    def _save(self) -> None:
        if self.task.cost:
            self.front.add(self.step, self.history)
        state = {name: getattr(self, name) for name in STATE} | {
            "identity": self.identity,
            "origin": self.origin,
            "before": asdict(self.before) if self.before else None,
            "scales": self.sampling.rewards.scales,
            "kl_weight": self.pull.beta,
            "multiplier": [self.multiplier.weight, self.multiplier.recent],
            "points": self.front.points,
            "last": self.front.last,
            "tokens": [self.updates.tokens, self.updates.naive],
        }
        self.updates.save(self.folder, step=self.step, state=state)
        self.front.clear()

    def _resume(self) -> None:
        state = self.updates.load(self.folder, self._admit)
        if state is None:
            return
        for name in STATE:
            setattr(self, name, state[name])
        self.before = Look(**state["before"])
        self.sampling.rewards = Mixture(self.task.rewards.parts, {name: Scale(*values) for name, values in state["scales"].items()})
        self.pull = replace(self.pull, beta=state["kl_weight"])
        weight, recent = state["multiplier"]
        self.multiplier = replace(self.multiplier, weight=weight, recent=tuple(recent))
        self.front.points, self.front.last = [Point(*p) for p in state["points"]], state["last"]
        self.updates.tokens, self.updates.naive = state["tokens"]

    def _admit(self, state: dict[str, Any]) -> None:
        """Raises DataError unless the checkpoint is of this very training."""
        if state["identity"] != self.identity:
            raise DataError(f"the checkpoint in {self.folder} was made with other prompts, rewards or options", hint="start a new run, or give the old ones")
        if state["origin"] != self.origin:
            raise DataError(f"the checkpoint in {self.folder} was made from another model", hint="open the model that the run began with, or start a new run")

    def _identity(self) -> str:
        """What a checkpoint belongs to. The time budget is not part of it: it may be raised on resumption."""
        options, objective, task = self.options.model_dump(exclude={"minutes", "save_every"}), self.updates.objective, self.task
        rewards = [[p.label, p.weight, p.reward.name, p.reward.options()] for p in task.rewards.parts]
        cost = [task.cost.name, task.cost.options(), asdict(task.multiplier)] if task.cost else None
        data = [[p.id for p in task.prompts], [p.id for p in self.sampling.spread[:LOOKED_AT]], [g.id for g in task.demonstrations]]
        return digest([options, self.online.model_dump(), objective.name, objective.options(), rewards, cost, data])


def _logp(parts: GroupLogProbs) -> Tensor:
    """Log-probability of each token, [E]."""
    assert parts.tokens is not None
    return parts.tokens.logp
