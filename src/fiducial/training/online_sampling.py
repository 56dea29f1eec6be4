"""What a model in training answers, and what its rewards think of that: draws answers and scores them, each process its share.

Answers are drawn to be learnt from, and now and then to be looked at. The first look puts rewards on one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fiducial.core.errors import ConfigError, DataError, FiducialError
from fiducial.core.records import Group, Prompt, digest
from fiducial.training import samples
from fiducial.training.data import Data
from fiducial.training.objective import GroupLogProbs
from fiducial.training.online_card import Look
from fiducial.training.online_options import OnlineOptions
from fiducial.training.online_task import Task, spread
from fiducial.training.processes import shared
from fiducial.training.rewards import Values, without_end
from fiducial.training.updates import Updates

LOOKED_AT = 32
"""Prompts that are answered once before training, now and then during it, and after it."""
FITTED_ON = 8 * LOOKED_AT
"""Prompts, at most, on whose answers rewards are put on one scale: further ones are asked where a reward says nothing of most."""
SCALED, FEWEST = 8, 2
"""Answers that a reward should score for that, and has to."""
GAP = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Mean difference of log-probability per token between sampler and scorer, in nats, that is rounding; 0.02 in smaller types."""


@dataclass(slots=True)
class Scored:
    """One step's answers with what is thought of them."""

    groups: list[Group]
    """With the total reward of each answer, and how it came about."""
    components: dict[str, Values]
    costs: Values
    drawn: Data
    old: GroupLogProbs
    before: GroupLogProbs


class Sampling:
    """Draws answers of the model that `updates` trains, and scores them; `start` is the model as it was. Called by every process."""

    def __init__(self, updates: Updates, task: Task, online: OnlineOptions, start: samples.Start) -> None:
        self.updates, self.task, self.online, self.start = updates, task, online, start
        self.model, self.options, self.accelerator = updates.model, updates.options, updates.accelerator
        self.rewards = task.rewards
        """On one scale from the first look on."""
        self.spread = spread(task.prompts)

    def drawn(self, prompts: Sequence[Prompt], purpose: str, step: int, *, k: int) -> Data:
        """Answers to the prompts, as tokens."""
        seed = int(digest([self.options.seed, purpose, step])[:15], 16)
        groups = shared(self.accelerator, list(enumerate(prompts)), lambda mine: samples.draw(self.model, mine, self.online, k=k, seed=seed))
        drawn = samples.data(self.model, groups, max_length=min(self.options.max_length, self.model.context))
        if not drawn.groups:
            raise DataError(f"none of the answers to {len(prompts)} prompts has a token to learn from", hint="this model has no end token; raise max_tokens")
        return drawn

    def scored(self, drawn: Data, step: int) -> Scored:
        """The rewards of the answers, and their log-probabilities under the model as it is and as it was, before step `step + 1`."""
        components, costs, notes = self._rewards(drawn.groups)
        totals, by = self._total(drawn.groups, components), {"annotator": f"step {step + 1}"}
        kept = [{"rewards": {name: list(values[i]) for name, values in components.items()}} | note for i, note in enumerate(notes)]
        groups = [g.model_copy(update={"rewards": r, "provenance": k, **by}) for g, r, k in zip(drawn.groups, totals, kept, strict=True)]
        old = self._under(drawn, values=True)
        with self.start.again():
            before = self._under(drawn, values=False)
        return Scored(groups, components, costs, drawn, old, before)

    def first_look(self) -> Look:
        """Answers before training, by which rewards are put on one scale. Raises FiducialError when what is scored is not what is sampled."""
        drawn = self.asked_again()
        gap = samples.sampler_gap(drawn.groups, self._under(drawn, values=False))
        if abs(gap) > GAP.get(next(self.model.module.parameters()).dtype, 0.02):
            raise FiducialError(
                f"the model's sampler and its scores differ by {gap:.2g} nats per token, so that distances would be wrong",
                hint="report this with the name of the model; float32 may help: --dtype float32",
            )
        components = self._rewards(drawn.groups)[0]
        self.rewards = self.rewards.fitted(self._for_scales(components))
        seen = self._seen(drawn, components)
        if all(r is None for r in seen.rewards):
            raise DataError(f"none of {len(seen.rewards)} answers could be scored", hint="look at what the reward says of some answers by itself")
        return seen

    def asked_again(self) -> Data:
        """One answer to each of the prompts that are looked at, with the same chance whenever it is asked for."""
        return self.drawn(self.spread[:LOOKED_AT], "look", 0, k=1)

    def look(self) -> Look:
        """What it says when asked again, and what rewards say of that."""
        drawn = self.asked_again()
        return self._seen(drawn, self._rewards(drawn.groups)[0])

    def _rewards(self, groups: Sequence[Group]) -> tuple[dict[str, Values], Values, list[dict[str, Any]]]:
        """What every reward says, the cost, and what rewards keep of each group for audit; each process scores its share."""

        def said(mine: Sequence[Group]) -> list[tuple[dict[str, tuple[tuple[float | None, ...], dict[str, Any]]], tuple[float | None, ...]]]:
            audited = self.rewards.audited(mine)
            costs: Values = self.task.cost.score(mine) if self.task.cost else [() for _ in mine]
            return [({name: each[i] for name, each in audited.items()}, tuple(costs[i])) for i in range(len(mine))]

        found = shared(self.accelerator, groups, said)
        components = {part.label: [each[part.label][0] for each, _ in found] for part in self.rewards.parts}
        notes = [{name: note for name, (_, note) in each.items() if note} for each, _ in found]
        return components, [cost for _, cost in found], [{"audit": note} if note else {} for note in notes]

    def _total(self, groups: Sequence[Group], components: dict[str, Values]) -> Values:
        totals = self.rewards.total(components)
        return totals if self.online.end_penalty is None else without_end(totals, groups, self.online.end_penalty)

    def _under(self, drawn: Data, *, values: bool) -> GroupLogProbs:
        """The drawn tokens under the model as it is now."""
        heads, at = self.updates.heads if values else None, self.online.temperature
        each = shared(self.accelerator, range(len(drawn.groups)), lambda mine: samples.per_group(self.model, drawn, mine, temperature=at, heads=heads))
        return drawn.parts.with_tokens(*torch.cat(each, dim=1).unbind())

    def _for_scales(self, components: dict[str, Values]) -> dict[str, Values]:
        """What rewards say of a look, and of further prompts while one of them has said too little. Raises ConfigError where one has no scale then."""
        asked = min(LOOKED_AT, len(self.spread))
        while self.rewards.quiet(components, SCALED) and asked < min(len(self.spread), FITTED_ON):
            more = self._rewards(self.drawn(self.spread[asked : asked + LOOKED_AT], "look", asked, k=1).groups)[0]
            components = {name: [*values, *more[name]] for name, values in components.items()}
            asked = min(asked + LOOKED_AT, len(self.spread))
        if silent := self.rewards.quiet(components, FEWEST):
            said = f"the reward '{silent[0]}' scores fewer than {FEWEST} of {asked} answers, so that it cannot be put on one scale with the others"
            raise ConfigError(said, hint="give more prompts that it is about, weight 0, or leave it out")
        return components

    def _seen(self, drawn: Data, components: dict[str, Values]) -> Look:
        return Look.of(drawn.groups, components, self._total(drawn.groups, components))
