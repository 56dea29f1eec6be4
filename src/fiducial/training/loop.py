"""The one training loop: groups in, engine log-probabilities, objective, optimizer; with a schedule, limits, and checkpoints that resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fiducial.core.config import refuse_idle
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Group, digest
from fiducial.core.roles import Objective
from fiducial.models import adapters
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.scorehead import BY_STEPS, Scale, scores
from fiducial.training import checkpoint, heldout, lora, reference, sharding
from fiducial.training.data import Data
from fiducial.training.objective import GroupLogProbs
from fiducial.training.options import TrainOptions
from fiducial.training.processes import accelerator_on, agreed
from fiducial.training.schedule import exploded, rate
from fiducial.training.scratch import begin_from_scratch
from fiducial.training.updates import Updates
from fiducial.training.weights import refuse_float16

if TYPE_CHECKING:
    from accelerate import Accelerator

TIMED = (5, 15)
"""Steps after which the speed is known roughly, and well enough to plan by: the first ones are slow, and batches differ."""
SCALED = 128
"""Groups, spread over the data, whose scores give a trained head its scale."""

Report = Callable[[int, int, dict[str, float]], None]
"""Called after each step with (step, steps, figures)."""
Watch = Callable[[int, LocalModel], tuple[dict[str, float], str]]
"""Called every `watch_every` steps with (step, model); gives figures to log, and a reason to stop or an empty string."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of a training run. `stop` is empty when all steps were made."""

    steps: int
    planned: int
    groups: int
    left_out: int
    tokens: int
    """Tokens the network saw, shared ones once."""
    naive_tokens: int
    """Tokens it would have seen without sharing."""
    seconds: float
    stop: str
    history: list[dict[str, float]] = field(default_factory=list)
    watched: list[dict[str, float]] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)
    """Loss and metrics on held-out groups, before training, at every look and after it; empty where nothing was held out."""
    held_before: heldout.Found = field(default_factory=list)
    """The first of them by group."""
    held_out: heldout.Found = field(default_factory=list)
    """The last of them by group."""
    held_together: heldout.Together = field(default_factory=dict)
    """Figures of the last look that are of all held-out groups together."""
    completions: int = 0
    endless: int = 0
    """How many of them no end token closes."""


def train(
    model: LocalModel,
    groups: Sequence[Group],
    objective: Objective,
    options: TrainOptions,
    *,
    folder: Path,
    tables: Path | None = None,
    report: Report | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """Trains `model` in place (it carries an adapter afterwards, if the rank is above 0) and keeps checkpoints in `folder`.
    What the reference model says is kept in `tables`, by default in the same folder; trainings of one model on the same data share it there.

    Called again after an interruption with the same arguments it goes on where the last checkpoint was, with the same result as if
    nothing had happened. Several processes (torchrun, accelerate launch) all call it, use the folder of the first, and all have the
    trained model afterwards. Raises DataError when no group can be used, FiducialError when the loss is no longer a number or a policy does not begin at
    its reference, and ConfigError for a configuration of accelerate that cannot be followed, or a rank that was set and is not that of the model's adapter.
    """
    accelerator = accelerator_on(model.device)
    folder = agreed(accelerator, folder)
    shared_out = sharding.wanted(accelerator)
    if shared_out and (watch or objective.controlled):
        raise ConfigError("weights that are shared out allow neither looks at samples in training nor control tokens", hint="train without FSDP")
    if not agreed(accelerator, watch is not None) and not options.held_out:
        refuse_idle(options, ["watch_every"], when="where no answers are drawn and nothing is held out", hint="leave it out, or give held_out")
    refuse_float16(model.module)
    lora.refuse_ignored(model.module, options)
    if options.from_scratch or options.sizes:
        begin_from_scratch(model, options)
    data, held = read(model, groups, objective, options)
    if held and "mismatched" in objective.reads and len(held.groups) < 2:
        raise ConfigError(f"{objective.name} pairs prompts with answers to others, but one group is held out", hint="raise held_out, or give more data")
    adapted, added = adapters.is_adapted(model.module), has_added(model, folder)
    with lora.adapter_off(model.module) if added else nullcontext():
        steps = (batch(step, len(data.groups), options) for step in range(planned_steps(len(data.groups), options)))
        tables = agreed(accelerator, tables) or folder
        material = _material(model, data, objective, steps, tables)
        proof = _material(model, held, objective, [range(len(held.groups))], tables) if held else None
    # where the weights that train were there before, a reference is of that very model; below a new adapter lie frozen weights
    moving = not options.lora_rank or (adapted and not added)
    origin = model.fingerprint if objective.needs_reference and moving else ""
    if options.lora_rank and not adapters.is_adapted(model.module):
        tokens = model.chat.control_ids if objective.controlled else ()
        model.module = lora.attach(model.module, rank=options.lora_rank, depth=options.lora_depth, seed=options.seed, tokens=tokens)
    lora.make_trainable(model.module)
    if adapters.is_adapted(model.module):
        origin = origin or lora.base_fingerprint(model.module)
    plain = sharding.share_out(model, accelerator) if shared_out else None
    result = _Trainer(Updates(model, objective, options, accelerator), material, proof, folder, origin).run(report, watch)
    if plain is not None:
        sharding.put_together(model, plain)
    if "scores" in objective.reads and objective.name != BY_STEPS:  # at steps scores are read as probabilities, which need no scale
        _take_scale(model, data, accelerator)
    return result


def read(model: LocalModel, groups: Sequence[Group], objective: Objective, options: TrainOptions) -> tuple[Data, Data | None]:
    """The groups as they are trained on, and those that are held out. A model that does not know the control tokens an objective needs learns of them."""
    if objective.controlled:
        model.take_control_tokens()
    with model.chat.without_lead() if objective.controlled else nullcontext():
        learnt, kept = heldout.divided(groups, options.held_out)
        return Data.of(model, learnt, objective, options), Data.of(model, kept, objective, options) if kept else None


def has_added(model: LocalModel, folder: Path) -> bool:
    """Whether the model's adapter was put on it by an interrupted call, whose checkpoints are in `folder`.

    An adapter that was there before is part of the model to start from, and of the reference; this one is not.
    """
    return adapters.is_adapted(model.module) and checkpoint.origin(folder) == lora.base_fingerprint(model.module)


def planned_steps(groups: int, options: TrainOptions) -> int:
    """Optimizer steps that `groups` groups take, when none is left out."""
    return max(1, math.ceil(_places(groups, options) / options.batch))


def _places(groups: int, options: TrainOptions) -> int:
    """Groups that are seen, each as often as it is; 1.1 times 100 is a little more than 110 in floating point."""
    return math.ceil(round(options.epochs * groups, 6))


def batch(step: int, groups: int, options: TrainOptions) -> list[int]:
    """Groups of a step: consecutive pieces of one shuffled pass after another, a function of seed and step alone."""
    places = range(step * options.batch, min((step + 1) * options.batch, _places(groups, options)))
    orders: dict[int, list[int]] = {}
    for epoch in {p // groups for p in places}:
        generator = torch.Generator().manual_seed(int(digest([options.seed, epoch])[:15], 16))
        orders[epoch] = torch.randperm(groups, generator=generator).tolist()
    return [orders[p // groups][p % groups] for p in places]


@dataclass(frozen=True, slots=True, eq=False)
class _Material:
    """Groups and what the reference model says of them."""

    data: Data
    reference: GroupLogProbs | None
    pairs: list[Tensor]
    """Of the mismatched pairs of each step."""

    def of_step(self, step: int) -> dict[str, Any]:
        """What a step is given of the reference."""
        return {"reference": self.reference, "mismatched": self.pairs[step] if self.pairs else None}


def _material(model: LocalModel, data: Data, objective: Objective, steps: Iterable[Sequence[int]], tables: Path) -> _Material:
    """The same groups with the reference model's word on them: the model as it is before training."""
    return _Material(data, _reference(model, data, objective, tables), _mismatched(model, data, objective, steps, tables))


def _take_scale(model: LocalModel, data: Data, accelerator: Accelerator) -> None:
    """Keeps with the head where its scores of the training data lie."""
    assert model.head is not None
    chosen = range(0, len(data.groups), math.ceil(len(data.groups) / SCALED))
    parts = data.parts.select(chosen)
    found = scores(model, [list(data.paths.ids[path]) for path in data.paths_of(chosen)]) if accelerator.is_main_process else None
    scale = Scale.of(found, parts.targets[parts.mask]) if found is not None else None
    model.head = replace(model.head, scale=agreed(accelerator, scale))


def _reference(model: LocalModel, data: Data, objective: Objective, tables: Path) -> GroupLogProbs | None:
    """Reference log-probabilities of the model as it is before training."""
    if not objective.needs_reference:
        return None
    tokens = "tokens" in objective.reads
    table = reference.logprobs(model.engine, data.paths, fingerprint=model.fingerprint, folder=tables, tokens=tokens)
    return data.parts.with_tokens(table) if tokens else data.parts.with_logp(data.place(range(len(data.groups)), table))


def _mismatched(model: LocalModel, data: Data, objective: Objective, steps: Iterable[Sequence[int]], tables: Path) -> list[Tensor]:
    """The same of the mismatched pairs of every step, of which the groups are given. Raises DataError where there is no second group."""
    if "mismatched" not in objective.reads:
        return []
    if len(data.groups) < 2:
        raise DataError(f"{objective.name} pairs each prompt with the answer to another, but there is one group", hint="give more data")
    pairs = [data.mismatched(step) for step in steps]
    paths = Paths([ids for step in pairs for ids in step.ids], [start for step in pairs for start in step.start])
    table = reference.logprobs(model.engine, paths, fingerprint=model.fingerprint, folder=tables)
    return list(table.split([len(step) for step in pairs]))


class _Trainer:
    """One training run: the state that changes, and a method per step of the loop."""

    def __init__(self, updates: Updates, material: _Material, proof: _Material | None, folder: Path, origin: str) -> None:
        self.updates, self.material, self.proof, self.folder, self.origin = updates, material, proof, folder, origin
        self.data = material.data
        self.model, self.objective, self.options, self.accelerator = updates.model, updates.objective, updates.options, updates.accelerator
        self.planned = planned_steps(len(self.data.groups), self.options)
        self.last = self.planned
        self.seconds = 0.0
        self.stop = ""
        self.history: list[dict[str, float]] = []
        self.watched: list[dict[str, float]] = []
        self.looks: list[dict[str, float]] = []
        self.held_before: heldout.Found = []
        self.held_out: heldout.Found = []
        self.held_together: heldout.Together = {}
        self.apart = 0.0
        self.norms: list[float] = []

    @property
    def step(self) -> int:
        """Steps made so far."""
        return self.updates.steps

    def run(self, report: Report | None, watch: Watch | None) -> TrainResult:
        """All steps from the last checkpoint on, until the schedule ends, time is up or a rule stops it."""
        self._resume()
        watching = agreed(self.accelerator, watch is not None)
        stop = self.stop or agreed(self.accelerator, self._spent())
        if not self.looks:
            self._look()
        if self.step < self.last and not stop:
            began = time.monotonic()
            # under noise blocks give other states every time
            with nullcontext() if self.options.neftune else self.updates.passes.keeping(self.data, passes=self.options.epochs):
                if not self.step:  # what was spent before an interruption holds it already
                    self._aside(began)
                stop = self._steps(report, watch, watching=watching)
        if not stop and self.last < self.planned:
            stop = f"the schedule was shortened to {self.last} of {self.planned} steps, which fit into {self.options.minutes:g} minutes"
        groups, left = len(self.data.groups), self.data.left_out
        counts = (self.updates.tokens, self.updates.naive, self.seconds)
        looks = (self.looks, self.held_before, self.held_out, self.held_together)
        ends = (len(self.data.paths), self.data.endless)
        return TrainResult(self.step, self.planned, groups, left, *counts, stop, self.history, self.watched, *looks, *ends)

    def _steps(self, report: Report | None, watch: Watch | None, *, watching: bool) -> str:
        """All that are left; why they ended early, or nothing."""
        stop = ""
        while self.step < self.last and not stop:
            began = time.monotonic()
            figures = self._one_step()
            self.seconds += time.monotonic() - began
            self.history.append({"step": self.step} | figures)
            if report and self.accelerator.is_main_process:
                report(self.step, self.last, figures)
            self.stop = self._limits(figures)
            before, self.last = self.last, agreed(self.accelerator, self._fitting())
            stop = self.stop or agreed(self.accelerator, self._spent())
            if stop or self.step == self.last or (self.options.watch_every and self.step % self.options.watch_every == 0):
                reasons = [self._look(), self._watch(watch) if watching else ""]
                # at the last step there is nothing left to stop; what was seen stands in the figures
                self.stop = self.stop or (next(filter(None, reasons), "") if self.step < self.last else "")
                stop = self.stop or stop
            # a schedule once shortened stays so, also for who goes on after a kill
            if self.step % self.options.save_every == 0 or self.step == self.last or self.last != before or stop:
                self._save()
        return stop

    def _one_step(self) -> dict[str, float]:
        chosen = batch(self.step, len(self.data.groups), self.options)
        now = rate(self.step, self.last, self.options, self.updates.rate)
        return self.updates.step(self.data, chosen, rate=now, begins_there=True, **self.material.of_step(self.step))

    def _watch(self, watch: Watch | None) -> str:
        """A look at fresh samples, by the main process; a reason to stop, or nothing."""
        began = time.monotonic()
        nothing: tuple[dict[str, float], str] = ({}, "")
        seen, reason = agreed(self.accelerator, watch(self.step, self.model) if watch else nothing)
        self._aside(began)
        self.watched.append({"step": self.step} | seen)
        return reason

    def _look(self) -> str:
        """A look at what is held out; a reason to stop, or nothing."""
        if self.proof is None:
            return ""
        began = time.monotonic()
        self.held_out, self.held_together = self.updates.measured(self.proof.data, **self.proof.of_step(0))
        if not self.step and self.objective.needs_reference:  # the policy is its own reference yet, and orders nothing
            self.held_out = [each | ({"accuracy": 0.5} if "accuracy" in each else {}) for each in self.held_out]
        figures = heldout.figures(self.held_out) | {name: value for name, (value, *_) in self.held_together.items()}
        if not figures.keys() & {"accuracy", "loss"}:
            raise ConfigError(f"{self.objective.name} learns nothing from the groups that are held out", hint="give another held_out, or more data")
        self.held_before = self.held_before or self.held_out
        self.looks.append({"step": float(self.step)} | figures)
        self._aside(began)
        return f"held out: {heldout.rule(self.looks, self.held_before, self.held_out)[1]}" if heldout.falling(self.looks) else ""

    def _aside(self, began: float) -> None:
        """Time that is no measure of a step's: of a look, or of what comes before the first."""
        spent = time.monotonic() - began
        self.seconds += spent
        self.apart += spent

    def _limits(self, figures: dict[str, float]) -> str:
        """A reason to stop that the step itself shows, or nothing."""
        reason = exploded(figures["grad_norm"], self.norms)
        self.norms.append(figures["grad_norm"])
        return reason

    def _fitting(self) -> int:
        """The last step that fits into the time, by the speed so far. A run that is merely cut off has learnt with a rate that never fell.

        In twentieths of the whole schedule, so that runs on one machine are planned alike, and with some grace: half while the speed is
        only roughly known, then five percent.
        """
        roughly, well = TIMED
        if self.options.minutes is None or self.step < roughly:
            return self.last
        fits = self.step + (60 * self.options.minutes - self.seconds) / ((self.seconds - self.apart) / self.step)
        if fits >= (0.5 if self.step < well else 0.95) * self.last:
            return self.last
        return max(self.step, self.planned * int(20 * fits / self.planned) // 20)

    def _spent(self) -> str:
        """A reason to stop when time is up; not kept in checkpoints, since a resumed run may be given more."""
        if self.options.minutes is not None and self.seconds > 1.2 * 60 * self.options.minutes and self.step < self.last:
            return f"the budget of {self.options.minutes:g} minutes is spent"
        return ""

    def _save(self) -> None:
        state = {
            "identity": self._identity(),
            "origin": self.origin,
            "last": [self.last, self.options.minutes],
            "stop": self.stop,
            "seconds": self.seconds,
            "tokens": self.updates.tokens,
            "naive": self.updates.naive,
            "history": self.history,
            "watched": self.watched,
            "looks": self.looks,
            "held_before": self.held_before,
            "held_out": self.held_out,
            "held_together": self.held_together,
            "apart": self.apart,
            "norms": self.norms,
        }
        self.updates.save(self.folder, step=self.step, state=state)

    def _resume(self) -> None:
        state = self.updates.load(self.folder, self._admit)
        if state is None:
            return
        self.updates.steps, self.updates.tokens, self.updates.naive = state["step"], state["tokens"], state["naive"]
        self.seconds = state["seconds"]
        self.history, self.watched, self.norms, self.stop = state["history"], state["watched"], state["norms"], state["stop"]
        self.looks, self.held_before, self.held_out = (state[name] for name in ("looks", "held_before", "held_out"))
        self.held_together = {name: (value, low, high) for name, (value, low, high) in state.get("held_together", {}).items()}
        self.apart = state.get("apart", 0.0)
        last, minutes = state["last"]
        self.last = last if minutes == self.options.minutes else self.planned  # other time, another plan

    def _admit(self, state: dict[str, Any]) -> None:
        """Raises DataError unless the checkpoint is of this very training."""
        if state["identity"] != self._identity():
            raise DataError(f"the checkpoint in {self.folder} was made with other data or options", hint="start a new run, or give the old options")
        if state["origin"] != self.origin:
            raise DataError(f"the checkpoint in {self.folder} was made from another model", hint="open the model that the run began with, or start a new run")

    def _identity(self) -> str:
        """What a checkpoint belongs to. The time budget is not part of it: it may be raised on resumption."""
        options = self.options.model_dump(exclude={"minutes", "save_every"})
        return digest([options, self.objective.name, self.objective.options(), self.data.names])
