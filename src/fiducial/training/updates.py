"""Optimizer steps: forward, backward and update on chosen groups, whatever the objective reads.

One row of the prefix-tree engine is in memory at a time. Losses couple the completions of one group only, so each row goes backward
on its own; a group that fills several rows takes two passes, the first without gradients, and is as exact. What couples a whole step
(mismatched pairs) carries no gradient and is computed before.

Losses are divided by the sum of the objective's `size` over the whole optimizer step, all rows and processes, so that 8 x 1, 4 x 2
and 1 x 8 give the same gradient. Several processes (torchrun, accelerate launch) each take their share of a step's groups, and the
gradients are added up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fiducial.core.errors import FiducialError
from fiducial.core.roles import Objective
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.scorehead import LAST, ScoreHead
from fiducial.models.scoring import Scores
from fiducial.training.data import Data
from fiducial.training.objective import GroupLogProbs
from fiducial.training.options import TrainOptions
from fiducial.training.weights import Trainables

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """The data of a step, and what holds for all of it."""

    data: Data
    reference: GroupLogProbs | None
    """Of all groups of the data."""
    mismatched: Tensor | None
    """Log-probabilities of the step's mismatched pairs, [M]."""


class Updates:
    """A model in training: its trainable weights, its optimizer, and the step that takes the data as an argument.

    `objective` may be replaced between steps by another that reads the same. Log-probabilities are of logits divided by `temperature`.
    """

    def __init__(self, model: LocalModel, objective: Objective, options: TrainOptions, accelerator: Accelerator, *, temperature: float = 1.0) -> None:
        self.model, self.objective, self.options, self.accelerator, self.temperature = model, objective, options, accelerator, temperature
        self._place = {"scores": "leaf", "values": "before"}.get(next((r for r in objective.reads if r in ("scores", "values")), ""), "")
        model.head = self._head() if self._place else None
        self.trainables = Trainables(model.module, {"score_head.weight": model.head.weight} if model.head else None)
        self.rate = options.learning_rate or objective.learning_rate * (10 if options.lora_rank else 1)
        """Peak learning rate."""
        self.optimizer = torch.optim.AdamW(self.trainables.parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True)
        self.steps = 0
        """Steps made."""
        self.tokens, self.naive = 0, 0
        """Tokens the network saw, and would have seen without sharing, over all processes."""
        self._seen = (0, 0)

    def step(
        self, data: Data, chosen: Sequence[int], *, rate: float, reference: GroupLogProbs | None = None, mismatched: Tensor | None = None
    ) -> dict[str, float]:
        """One update on the chosen groups of `data`; figures are over the whole step and all processes.

        `reference` holds all groups of the data under the reference model, `mismatched` its log-probabilities of `data.mismatched(chosen)`.
        Raises FiducialError when the loss is no longer a number; the model is as it was then.
        """
        self._seen = (0, 0)
        everything = data.parts.select(chosen)
        # what the step's losses are divided by is known before anything is computed, on every process
        total = float((everything.weight * self.objective.size(everything)).sum())
        share = everything.weight / (total or 1.0)  # nothing to divide by when no group of the step counts
        mine = range(self.accelerator.process_index, len(chosen), self.accelerator.num_processes)
        own = [chosen[i] for i in mine]
        work = _Work(data, replace(reference, mismatched=mismatched) if reference is not None else None, self._mismatched(data, chosen))
        loss, read = self._backward(work, own, share[torch.tensor(list(mine), dtype=torch.long)])
        self._reduce()
        norm = float(torch.nn.utils.clip_grad_norm_(self.trainables.parameters, self.options.clip))
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        figures = self._figures(work, own, loss, read) | {"grad_norm": norm, "learning_rate": rate}
        if not math.isfinite(figures["loss"]) or not math.isfinite(norm):
            rows = ", ".join(data.names[g] for g in chosen)
            raise FiducialError(f"the loss is no longer a number at step {self.steps + 1}; groups of the step: {rows}", hint="lower the learning rate")
        self.optimizer.step()
        self.trainables.publish()
        self.steps += 1
        return figures

    def _head(self) -> ScoreHead:
        """The model's head if it means what the objective says, else a fresh one."""
        held, name, higher_is = self.model.head, self.objective.name, self.objective.higher_is
        if held is not None and (held.trained_by, held.higher_is) == (name, higher_is):
            return held
        return ScoreHead.fresh(self.model.width, seed=self.options.seed, higher_is=higher_is, trained_by=name, device=self.model.device)

    @property
    def _asked(self) -> dict[str, Any]:
        """What is asked of the engine."""
        hidden = {"layers": LAST, "at": self._place} if self._place else None
        return {"temperature": self.temperature, "hidden": hidden}

    def _read(self, scores: Scores) -> list[Tensor]:
        """What the objective reads of some paths, differentiable: log-probabilities or a head's scores per path, or both per token."""
        logp = scores.edge_logp if "tokens" in self.objective.reads else scores.path_logp
        if self.model.head is None:
            return [logp]
        assert scores.hidden is not None
        found = self.model.head(scores.hidden[LAST])
        return [found] if self._place == "leaf" else [logp, found]

    def _spans(self, paths: Paths) -> list[range]:
        """Where what is read of each path stands in what is read of all."""
        return paths.spans() if "tokens" in self.objective.reads else [range(i, i + 1) for i in range(len(paths))]

    def _policy(self, work: _Work, chosen: Sequence[int], read: Sequence[Tensor]) -> GroupLogProbs:
        """What the objective sees. Labels and reference are on the CPU, and so few numbers are best put together there."""
        first, *more = (r.float().cpu() for r in read)
        groups = work.data.parts.select(chosen)
        if "tokens" in self.objective.reads:
            groups = groups.with_tokens(first, *more)
        elif self._place == "leaf":
            groups = replace(groups, scores=work.data.place(chosen, first))
        else:
            groups = groups.with_logp(work.data.place(chosen, first))
        return replace(groups, mismatched=work.mismatched)

    def _loss(self, work: _Work, chosen: Sequence[int], share: Tensor, read: Sequence[Tensor]) -> Tensor:
        losses = self.objective(self._policy(work, chosen, read), work.reference.select(chosen) if work.reference is not None else None)
        return (share * losses).sum()

    def _backward(self, work: _Work, chosen: list[int], share: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Adds the gradient of `sum(share * loss)`; gives that sum and what was read of the chosen groups."""
        paths = work.data.paths.select(work.data.paths_of(chosen))
        spans = self._spans(paths)
        found = [torch.zeros(spans[-1].stop if spans else 0) for _ in range(2 if self._place == "before" else 1)]
        if not chosen:
            return torch.zeros(()), found
        owner = [i for i, g in enumerate(chosen) for _ in work.data.groups[g].completions]
        rows = self.model.engine.plan(paths, grad=True, keep_last=self._place == "leaf")
        self._saw(sum(len(row.ids) for row in rows), paths)
        if len({(owner[p], i) for i, row in enumerate(rows) for p in row.paths}) > len(chosen):
            return self._two_passes(work, chosen, share, paths, spans)
        total = torch.zeros(())
        for indices, scores in self.model.engine.stream(paths, grad=True, **self._asked):
            # rows hold whole groups, and their paths in ascending order, so that this is the order of the groups' places
            members, at = sorted({owner[p] for p in indices}), _at(spans, indices)
            read = self._read(scores)
            loss = self._loss(work, [chosen[m] for m in members], share[members], read)
            loss.backward()
            self.trainables.collect()
            for all_of_it, part in zip(found, read, strict=True):
                all_of_it[at] = part.detach().float().cpu()
            total += loss.detach().cpu()
        return total, found

    def _two_passes(self, work: _Work, chosen: list[int], share: Tensor, paths: Paths, spans: list[range]) -> tuple[Tensor, list[Tensor]]:
        """The same when groups are spread over rows: the loss's gradient with respect to what is read first, then row by row."""
        with torch.no_grad():
            found = [r.float() for r in self._read(self.model.engine.score(paths, **self._asked))]
        leaves = [f.requires_grad_() for f in found]
        loss = self._loss(work, chosen, share, leaves)
        pulls = torch.autograd.grad(loss, leaves, allow_unused=True)
        for indices, scores in self.model.engine.stream(paths, grad=True, **self._asked):
            at = _at(spans, indices)
            pulled = [(pull[at] * part).sum() for pull, part in zip(pulls, self._read(scores), strict=True) if pull is not None]
            torch.stack(pulled).sum().backward()
            self.trainables.collect()
        return loss.detach().cpu(), [leaf.detach().cpu() for leaf in leaves]

    def _mismatched(self, data: Data, chosen: Sequence[int]) -> Tensor | None:
        """Log-probabilities of the step's mismatched pairs under the model as it is, each process computing its share."""
        if "mismatched" not in self.objective.reads:
            return None
        paths = data.mismatched(chosen)
        mine = list(range(self.accelerator.process_index, len(paths), self.accelerator.num_processes))
        own = paths.select(mine)
        self._saw(sum(len(row.ids) for row in self.model.engine.plan(own)), own)
        found = torch.zeros(len(paths))
        found[mine] = self.model.engine.score(own, temperature=self.temperature).path_logp.float().cpu()
        # each place is filled by one process, zero elsewhere
        return torch.stack(self._gathered(found)).sum(0)

    def _saw(self, fed: int, paths: Paths) -> None:
        self._seen = (self._seen[0] + fed, self._seen[1] + sum(len(ids) for ids in paths.ids))

    def _figures(self, work: _Work, chosen: list[int], loss: Tensor, read: list[Tensor]) -> dict[str, float]:
        """Loss and the objective's metrics, summed or averaged over processes. Counts the tokens of the step too."""
        own: Mapping[str, float] = {}
        if chosen:
            own = self.objective.metrics(self._policy(work, chosen, read), work.reference.select(chosen) if work.reference is not None else None)
        gathered = self._gathered((float(loss), len(chosen), own, self._seen))
        self.tokens += sum(seen[0] for *_, seen in gathered)
        self.naive += sum(seen[1] for *_, seen in gathered)
        means = {}
        for name in sorted({name for _, _, values, _ in gathered for name in values}):
            said = [(values[name], n) for _, n, values, _ in gathered if name in values]
            means[name] = sum(value * n for value, n in said) / sum(n for _, n in said)
        return {"loss": sum(x for x, *_ in gathered)} | means

    def _gathered(self, own: Any) -> list[Any]:
        """What every process says, in their order."""
        gathered = [own]
        if self.accelerator.num_processes > 1:
            gathered *= self.accelerator.num_processes
            torch.distributed.all_gather_object(gathered, own)
        return gathered

    def _reduce(self) -> None:
        """Adds up gradients over processes; a process without groups of its own takes part with zeros."""
        if self.accelerator.num_processes == 1:
            return
        for p in self.trainables.parameters:
            p.grad = self.accelerator.reduce(p.grad if p.grad is not None else torch.zeros_like(p), reduction="sum")


def _at(spans: list[range], indices: Sequence[int]) -> Tensor:
    return torch.tensor([place for i in indices for place in spans[i]], dtype=torch.long)
