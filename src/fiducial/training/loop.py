"""The one training loop: groups in, engine log-probabilities, objective, optimizer.

One row of the prefix-tree engine is in memory at a time. Losses couple the completions of one group only, so each row goes backward
on its own; a group that fills several rows takes two passes, the first without gradients, and is as exact.

Token-level losses are divided by the tokens of the whole optimizer step, others by its groups, over all rows and processes, so that
8 x 1, 4 x 2 and 1 x 8 give the same gradient. Several processes (torchrun, accelerate launch) each take their share of a step's
groups, and the gradients are added up.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fiducial.core.errors import DataError, FiducialError
from fiducial.core.records import Group, digest
from fiducial.core.roles import Objective
from fiducial.models import adapters
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.training import checkpoint, lora, reference
from fiducial.training.objective import GroupLogProbs, layout
from fiducial.training.options import TrainOptions
from fiducial.training.weights import Trainables

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
TIMED = 5
"""Steps after which the speed is known well enough to plan by."""

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


def train(
    model: LocalModel,
    groups: Sequence[Group],
    objective: Objective,
    options: TrainOptions,
    *,
    folder: Path,
    report: Report | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """Trains `model` in place (it carries an adapter afterwards, if the rank is above 0) and keeps checkpoints in `folder`.

    Called again after an interruption with the same arguments it goes on where the last checkpoint was, with the same result as if
    nothing had happened. Raises DataError when no group can be used, FiducialError when the loss is no longer a number.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    data = _Data.of(model, groups, options, least=objective.least, contrasts=objective.contrasts)
    table = _reference(model, data, objective, folder)
    if options.lora_rank and not adapters.is_adapted(model.module):
        model.module = lora.attach(model.module, rank=options.lora_rank, depth=options.lora_depth, seed=options.seed)
    lora.make_trainable(model.module)
    return _Trainer(model, data, table, objective, options, accelerator, folder).run(report, watch)


def planned_steps(groups: int, options: TrainOptions) -> int:
    """Optimizer steps that `groups` groups take, when none is left out."""
    return max(1, math.ceil(options.epochs * groups / options.batch))


@dataclass(frozen=True, slots=True)
class _Data:
    """Tokenised groups: paths of all completions, where each group's paths are, and what does not depend on a model."""

    groups: list[Group]
    names: list[str]
    """Id of each group as it was given, which may have held more completions."""
    paths: Paths
    first: list[int]
    parts: GroupLogProbs
    left_out: int

    @classmethod
    def of(cls, model: LocalModel, groups: Sequence[Group], options: TrainOptions, *, least: int = 1, contrasts: bool = True) -> _Data:
        kept, names, ids, starts, owner, first, lengths, left_out = [], [], [], [], [], [], [], 0
        for given in groups:
            group = given if contrasts else _preferred(given)
            # an answer that was cut off has no end: teaching one would teach to stop in mid-sentence
            rows = [model.encode(group.prompt.messages, c.text, end=c.finish != "length") for c in group.completions]
            sizes = [len(row) - start for row, start in rows]
            if len(rows) < max(1, least) or max(len(row) for row, _ in rows) > min(options.max_length, model.context) or min(sizes) < 1:
                left_out += 1
                continue
            first.append(len(ids))
            owner += [len(kept)] * len(rows)
            ids += [row for row, _ in rows]
            starts += [start for _, start in rows]
            lengths.append(sizes)
            kept.append(group)
            names.append(given.id)
        if not kept:
            raise DataError(
                f"none of {len(groups)} groups can be trained on", hint=f"each needs {least} completions or more and must fit into max_length; see the data"
            )
        return cls(kept, names, Paths(ids=ids, start=starts, group=owner), first, layout(kept, lengths), left_out)

    def paths_of(self, chosen: Sequence[int]) -> list[int]:
        """Indices of the paths of some groups."""
        return [self.first[g] + k for g in chosen for k in range(len(self.groups[g].completions))]


def _preferred(group: Group) -> Group:
    """The group without completions that have no share in its target."""
    targets = group.targets or (1.0, *[0.0] * (len(group.completions) - 1))[: len(group.completions)]
    kept = [k for k, share in enumerate(targets) if share > 0]
    if len(kept) == len(group.completions):
        return group
    rewards = tuple(group.rewards[k] for k in kept) if group.rewards is not None else None
    return group.model_copy(update={"completions": tuple(group.completions[k] for k in kept), "targets": tuple(targets[k] for k in kept), "rewards": rewards})


def _reference(model: LocalModel, data: _Data, objective: Objective, folder: Path) -> GroupLogProbs | None:
    """Reference log-probabilities of the model as it is before training (its adapter off, so that a resumed run sees the same)."""
    if not objective.needs_reference:
        return None
    with lora.adapter_off(model.module):
        table = reference.logprobs(model.engine, data.paths, fingerprint=model.fingerprint, folder=folder)
    return data.parts.with_logp(_place(data, range(len(data.groups)), table))


def _place(data: _Data, chosen: Sequence[int], logp: Tensor) -> Tensor:
    """Path log-probabilities, in the order of `paths_of(chosen)`, as [G, K] with zeros where there is no completion."""
    mask = data.parts.mask[torch.as_tensor(list(chosen), dtype=torch.long)]
    where = mask.flatten().nonzero().squeeze(1)
    flat = torch.zeros(mask.numel(), dtype=logp.dtype, device=logp.device)
    return flat.index_put((where.to(logp.device),), logp).view(mask.shape)


class _Trainer:
    """One training run: the state that changes, and a method per step of the loop."""

    def __init__(
        self, model: LocalModel, data: _Data, table: GroupLogProbs | None, objective: Objective, options: TrainOptions, accelerator: Accelerator, folder: Path
    ) -> None:
        self.model, self.data, self.table, self.objective, self.options = model, data, table, objective, options
        self.accelerator, self.folder = accelerator, folder
        self.trainables = Trainables(model.module)
        rate = options.learning_rate or objective.learning_rate * (10 if options.lora_rank else 1)
        self.rate = rate
        self.optimizer = torch.optim.AdamW(self.trainables.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True)
        self.planned = planned_steps(len(data.groups), options)
        self.last = self.planned
        # with an adapter the frozen weights are not in the checkpoint; without one a reference must be of the model that was started from
        self.origin = lora.base_fingerprint(model.module) if adapters.is_adapted(model.module) else model.fingerprint if objective.needs_reference else ""
        self.step, self.seconds, self.tokens, self.naive = 0, 0.0, 0, 0
        self.stop = ""
        self.seen = (0, 0)
        self.history: list[dict[str, float]] = []
        self.watched: list[dict[str, float]] = []
        self.norms: list[float] = []

    def run(self, report: Report | None, watch: Watch | None) -> TrainResult:
        self._resume()
        stop = self.stop or self._agreed(self._spent())
        while self.step < self.last and not stop:
            began = time.monotonic()
            figures = self._one_step()
            self.step += 1
            self.seconds += time.monotonic() - began
            self.history.append({"step": self.step} | figures)
            if report and self.accelerator.is_main_process:
                report(self.step, self.last, figures)
            self.stop = self._limits(figures)
            self.last = self._agreed(self._fitting())
            stop = self.stop or self._agreed(self._spent())
            if watch and (stop or self.step == self.last or (self.options.watch_every and self.step % self.options.watch_every == 0)):
                began = time.monotonic()
                seen, reason = watch(self.step, self.model)
                self.seconds += time.monotonic() - began
                self.watched.append({"step": self.step} | seen)
                # at the last step there is nothing left to stop; what the look found stands in its figures
                self.stop = self._agreed(self.stop or (reason if self.step < self.last else ""))
                stop = self.stop or stop
            if self.step % self.options.save_every == 0 or self.step == self.last or stop:
                self._save()
        if not stop and self.last < self.planned:
            stop = f"the schedule was shortened to {self.last} of {self.planned} steps, which fit into {self.options.minutes:g} minutes"
        groups, left = len(self.data.groups), self.data.left_out
        return TrainResult(self.step, self.planned, groups, left, self.tokens, self.naive, self.seconds, stop, self.history, self.watched)

    def _one_step(self) -> dict[str, float]:
        """Forward, backward and update on the next batch; figures are over the whole step and all processes."""
        chosen = self._batch(self.step)
        everything = self.data.parts.select(chosen)
        tokens = (everything.targets * everything.length).sum(1)
        # what the step's losses are divided by is known before anything is computed, on every process
        total = float((everything.weight * tokens).sum() if self.objective.per_token else everything.weight.sum())
        share = everything.weight / (total or 1.0)  # nothing to divide by when no group of the step counts
        mine = range(self.accelerator.process_index, len(chosen), self.accelerator.num_processes)
        losses, logp = self._backward([chosen[i] for i in mine], share[torch.tensor(list(mine), dtype=torch.long)])
        self._reduce()
        norm = float(torch.nn.utils.clip_grad_norm_(self.trainables.parameters, self.options.clip))
        rate = self._rate(self.step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        figures = self._figures([chosen[i] for i in mine], losses, logp) | {"grad_norm": norm, "learning_rate": rate}
        if not math.isfinite(figures["loss"]) or not math.isfinite(norm):
            rows = ", ".join(self.data.names[g] for g in chosen)
            raise FiducialError(f"the loss is no longer a number at step {self.step + 1}; groups of the step: {rows}", hint="lower the learning rate")
        self.optimizer.step()
        self.trainables.publish()
        return figures

    def _backward(self, chosen: list[int], share: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradient of `sum(share * loss)`; gives the weighted loss and the log-probabilities [G, K] of the chosen groups."""
        self.seen = (0, 0)
        if not chosen:
            return torch.zeros(()), torch.zeros(0, self.data.parts.mask.shape[1])
        paths = self.data.paths.select(self.data.paths_of(chosen))
        owner = [i for i, g in enumerate(chosen) for _ in self.data.groups[g].completions]
        rows = self.model.engine.plan(paths, grad=True)
        self.seen = (sum(len(row.ids) for row in rows), sum(len(ids) for ids in paths.ids))
        logp = torch.zeros(len(paths))
        total = torch.zeros(())
        whole = all(len({i for i, row in enumerate(rows) if any(owner[p] == g for p in row.paths)}) == 1 for g in range(len(chosen)))
        if not whole:
            return self._two_passes(chosen, share, paths)
        for indices, scores in self.model.engine.stream(paths, grad=True):
            members = sorted({owner[p] for p in indices})
            # the row's paths in the order in which the groups' places are filled
            order = torch.tensor(sorted(range(len(indices)), key=lambda j: indices[j]))
            loss = self._loss([chosen[m] for m in members], share[members], scores.path_logp[order])
            loss.backward()
            self.trainables.collect()
            logp[torch.tensor(indices)] = scores.path_logp.detach().float().cpu()
            total += loss.detach().cpu()
        return total, _place(self.data, chosen, logp)

    def _two_passes(self, chosen: list[int], share: Tensor, paths: Paths) -> tuple[Tensor, Tensor]:
        """The same when groups are spread over rows: the loss's gradient with respect to log-probabilities first, then row by row."""
        logp = self.model.engine.score(paths).path_logp.float().requires_grad_()
        loss = self._loss(chosen, share, logp)
        (pull,) = torch.autograd.grad(loss, logp)
        for indices, scores in self.model.engine.stream(paths, grad=True):
            (pull[torch.tensor(indices)] * scores.path_logp).sum().backward()
            self.trainables.collect()
        return loss.detach().cpu(), _place(self.data, chosen, logp.detach().cpu())

    def _loss(self, chosen: list[int], share: Tensor, logp: Tensor) -> Tensor:
        # labels and reference are on the CPU, and so few numbers are best put together there
        policy = self.data.parts.select(chosen).with_logp(_place(self.data, chosen, logp.float().cpu()))
        losses = self.objective(policy, self.table.select(chosen) if self.table is not None else None)
        return (share * losses).sum()

    def _figures(self, chosen: list[int], loss: Tensor, logp: Tensor) -> dict[str, float]:
        """Loss and the objective's metrics, summed or averaged over processes. Counts the tokens of the step too."""
        policy = self.data.parts.select(chosen).with_logp(logp)
        own = self.objective.metrics(policy, self.table.select(chosen) if self.table is not None else None) if chosen else {}
        gathered: list[Any] = [(float(loss), len(chosen), own, self.seen)]
        if self.accelerator.num_processes > 1:
            gathered *= self.accelerator.num_processes
            torch.distributed.all_gather_object(gathered, (float(loss), len(chosen), own, self.seen))
        self.tokens += sum(seen[0] for *_, seen in gathered)
        self.naive += sum(seen[1] for *_, seen in gathered)
        names = {name for _, _, values, _ in gathered for name in values}
        count = sum(n for _, n, _, _ in gathered)
        means = {name: sum(values.get(name, 0.0) * n for _, n, values, _ in gathered) / count for name in sorted(names)}
        return {"loss": sum(x for x, *_ in gathered)} | means

    def _reduce(self) -> None:
        """Adds up gradients over processes; a process without groups of its own takes part with zeros."""
        if self.accelerator.num_processes == 1:
            return
        for p in self.trainables.parameters:
            p.grad = self.accelerator.reduce(p.grad if p.grad is not None else torch.zeros_like(p), reduction="sum")

    def _batch(self, step: int) -> list[int]:
        """Groups of a step: consecutive pieces of one shuffled pass after another, a function of seed and step alone."""
        n, size = len(self.data.groups), self.options.batch
        places = range(step * size, min((step + 1) * size, math.ceil(self.options.epochs * n)))
        orders: dict[int, list[int]] = {}
        for epoch in {p // n for p in places}:
            generator = torch.Generator().manual_seed(int(digest([self.options.seed, epoch])[:15], 16))
            orders[epoch] = torch.randperm(n, generator=generator).tolist()
        return [orders[p // n][p % n] for p in places]

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to zero at the last step that the time allows."""
        rising = max(1, round(self.options.warmup * self.last))
        if step < rising:
            return self.rate * (step + 1) / rising
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.last - rising)))

    def _limits(self, figures: dict[str, float]) -> str:
        """A reason to stop that the step itself shows, or nothing."""
        usual = statistics.median(self.norms) if len(self.norms) >= 10 else math.inf
        self.norms.append(figures["grad_norm"])
        if figures["grad_norm"] > 100 * usual:
            return f"the gradient's norm {figures['grad_norm']:.3g} is over 100 times its median {usual:.3g}"
        return ""

    def _fitting(self) -> int:
        """The last step that fits into the time, by the speed so far. A run that is merely cut off has learnt with a rate that never fell.

        In tenths of the whole schedule and with five percent of grace, so that runs on one machine are planned alike.
        """
        if self.options.minutes is None or self.step < TIMED:
            return self.last
        fits = self.step + (60 * self.options.minutes - self.seconds) / (self.seconds / self.step)
        if fits >= 0.95 * self.last:
            return self.last
        return max(self.step, self.planned * int(10 * fits / self.planned) // 10)

    def _spent(self) -> str:
        """A reason to stop when time is up; not kept in checkpoints, since a resumed run may be given more."""
        if self.options.minutes is not None and self.seconds > 1.1 * 60 * self.options.minutes and self.step < self.last:
            return f"the budget of {self.options.minutes:g} minutes is spent"
        return ""

    def _agreed(self, said: T) -> T:
        """What the main process says: clocks differ, and a process that stops alone leaves the others waiting."""
        if self.accelerator.num_processes > 1:
            told = [said]
            torch.distributed.broadcast_object_list(told, src=0)
            return told[0]
        return said

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "identity": self._identity(),
                "origin": self.origin,
                "last": [self.last, self.options.minutes],
                "stop": self.stop,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "naive": self.naive,
                "history": self.history,
                "watched": self.watched,
                "norms": self.norms,
            }
            checkpoint.save(self.folder, step=self.step, weights=self.trainables.masters, optimizer=self.optimizer, state=state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        state = checkpoint.load(self.folder, weights=self.trainables.masters, optimizer=self.optimizer, admit=self._admit)
        if state is None:
            return
        self.trainables.publish()
        self.step, self.seconds, self.tokens, self.naive = state["step"], state["seconds"], state["tokens"], state["naive"]
        self.history, self.watched, self.norms, self.stop = state["history"], state["watched"], state["norms"], state["stop"]
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
