"""Optimizer steps: forward, backward and update on chosen groups, whatever the objective reads.

One row of the prefix-tree engine is in memory at a time. Losses couple the completions of one group only, so each row goes backward
on its own; a group that fills several rows takes two passes, the first without gradients, and is as exact. What couples a whole step
(mismatched pairs) carries no gradient and is computed before.

Losses are divided by the sum of the objective's `size` over the whole optimizer step, all rows and processes, so that 8 x 1, 4 x 2
and 1 x 8 give the same gradient. Several processes (torchrun, accelerate launch) each take their share of a step's groups, and the
gradients are added up. Where weights are shared out besides (FSDP), each pass needs every process, so all make as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fiducial.core.errors import FiducialError
from fiducial.core.roles import Objective
from fiducial.models import abreast
from fiducial.models.forest import Paths, Row
from fiducial.models.local import LocalModel
from fiducial.models.scorehead import LAST, ScoreHead
from fiducial.models.scoring import Engine, Scores
from fiducial.training import checkpoint
from fiducial.training.data import Data
from fiducial.training.objective import GroupLogProbs
from fiducial.training.options import TrainOptions
from fiducial.training.processes import gathered, total
from fiducial.training.sharding import IDLE
from fiducial.training.weights import Trainables

if TYPE_CHECKING:
    from accelerate import Accelerator


TOKENS_EACH = 128
"""Fewer tokens are not worth a thread of their own."""


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
        self._engines: list[Engine] = []

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
        counted = float((everything.weight * self.objective.size(everything)).sum())
        share = everything.weight / (counted or 1.0)  # nothing to divide by when no group of the step counts
        mine = range(self.accelerator.process_index, len(chosen), self.accelerator.num_processes)
        own = [chosen[i] for i in mine]
        work = _Work(data, replace(reference, mismatched=mismatched) if reference is not None else None, self._mismatched(data, chosen))
        loss, read = self._backward(work, own, share[torch.tensor(list(mine), dtype=torch.long)])
        self._reduce()
        norm = self._clip()
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

    def save(self, folder: Path, *, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint of weights, moments and `state`; called by every process, and the first one writes."""
        main = self.accelerator.is_main_process
        self.accelerator.wait_for_everyone()
        checkpoint.save(
            folder,
            step=step,
            weights=self.trainables.masters,
            optimizer=self.optimizer,
            state=state,
            whole=lambda name, part: self.trainables.whole(name, part, keep=main),
            write=main,
        )
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path, admit: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Goes back to the newest checkpoint, if there is one that `admit` does not raise at; its state."""
        state = checkpoint.load(folder, weights=self.trainables.masters, optimizer=self.optimizer, admit=admit, part=self.trainables.part)
        if state is not None:
            self.trainables.publish()
        return state

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

    def _passes(self, paths: Paths, *, grad: bool) -> Iterator[tuple[list[int], Scores]]:
        """The engine's rows. Where weights are shared out, rows of no path follow until every process has had as many."""
        idle = 0
        if self.trainables.shared_out:
            own = len(self._plan(paths, grad=grad))
            idle = max(gathered(self.accelerator, own)) - own
        yield from self.model.engine.stream(paths, grad=grad, **self._asked)
        for _ in range(idle):
            for _, scores in self.model.engine.stream(IDLE, grad=grad, **self._asked):
                yield [], scores

    def _plan(self, paths: Paths, *, grad: bool) -> list[Row]:
        return self.model.engine.plan(paths, grad=grad, keep_last=self._place == "leaf")

    def _pull(self, loss: Tensor) -> None:
        loss.backward()
        self.trainables.collect()

    def _backward(self, work: _Work, chosen: list[int], share: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Adds the gradient of `sum(share * loss)`; gives that sum and what was read of the chosen groups."""
        parts = self._parts(work, chosen)
        if len(parts) > 1:
            return self._abreast(work, chosen, share, parts)
        paths, owner = self._paths(work, chosen)
        spans = self._spans(paths)
        rows = self._plan(paths, grad=True)
        self._saw(sum(len(row.ids) for row in rows), paths)
        spread = _spread(rows, owner)
        if any(gathered(self.accelerator, spread)) if self.trainables.shared_out else spread:
            return self._two_passes(work, chosen, share, paths, spans)
        return self._row_by_row(work, chosen, share, self._passes(paths, grad=True), self._pull)

    def _row_by_row(
        self, work: _Work, chosen: list[int], share: Tensor, passes: Iterator[tuple[list[int], Scores]], pull: Callable[[Tensor], None]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same for rows that hold whole groups; `pull` takes each row's part of the loss."""
        paths, owner = self._paths(work, chosen)
        spans = self._spans(paths)
        sum_of_losses, found = torch.zeros(()), self._nothing(spans)
        for indices, scores in passes:
            read = self._read(scores)
            if not indices:
                pull(_nought(read))
                continue
            # rows hold their paths in ascending order, so that this is the order of the groups' places
            members, at = sorted({owner[p] for p in indices}), _at(spans, indices)
            loss = self._loss(work, [chosen[m] for m in members], share[members], read)
            pull(loss)
            for all_of_it, part in zip(found, read, strict=True):
                all_of_it[at] = part.detach().float().cpu()
            sum_of_losses += loss.detach().cpu()
        return sum_of_losses, found

    def _paths(self, work: _Work, chosen: list[int]) -> tuple[Paths, list[int]]:
        """The paths of the chosen groups, and the place of each one's group among them."""
        paths = work.data.paths.select(work.data.paths_of(chosen))
        return paths, [i for i, g in enumerate(chosen) for _ in work.data.groups[g].completions]

    def _parts(self, work: _Work, chosen: list[int]) -> list[list[int]]:
        """Places among the chosen groups, for each thread; one part where threads do not pay.

        Each thread has a gradient of its own, hence only adapters; and a group that fills several rows is left to `_two_passes`.
        """
        alone = [list(range(len(chosen)))]
        apart = any(master is not p for p, master in zip(self.trainables.named.values(), self.trainables.masters.values(), strict=True))
        if self.accelerator.num_processes > 1 or not self.options.lora_rank or apart:
            return alone
        paths, owner = self._paths(work, chosen)
        size = [0] * len(chosen)
        for place, ids in zip(owner, paths.ids, strict=True):
            size[place] += len(ids)
        parts: list[list[int]] = [[] for _ in range(abreast.threads(self.model.device, min(len(chosen), sum(size) // TOKENS_EACH)))]
        for place in sorted(range(len(chosen)), key=lambda i: (-size[i], i)):
            min(parts, key=lambda part: sum(size[i] for i in part)).append(place)
        parts = [sorted(part) for part in parts]
        for part in parts:
            own, of = self._paths(work, [chosen[i] for i in part])
            if _spread(self._plan(own, grad=True), of):
                return alone
        return parts if len(self._beside(len(parts))) == len(parts) else alone

    def _beside(self, count: int) -> list[Engine]:
        """An engine for each thread, around the same parameters; fewer where the model cannot be copied."""
        if len(self._engines) < count:
            engine = self.model.engine
            self._engines = [engine, *(engine.beside(module) for module in abreast.twins(self.model.module, count)[1:])]
        return self._engines[:count]

    def _abreast(self, work: _Work, chosen: list[int], share: Tensor, parts: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
        """The same with a thread for each part; gradients are added in the order of the parts, so that every run adds alike."""
        parameters = self.trainables.parameters

        def alone(engine: Engine, part: list[int]) -> tuple[Tensor, list[Tensor], list[Tensor | None], int]:
            own = [chosen[i] for i in part]
            paths, _ = self._paths(work, own)
            grads: list[Tensor | None] = [None] * len(parameters)

            def pull(loss: Tensor) -> None:
                for i, grad in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                    grads[i] = _sum(grads[i], grad)

            passes = engine.stream(paths, grad=True, **self._asked)
            return *self._row_by_row(work, own, share[part], passes, pull), grads, sum(len(row.ids) for row in engine.plan(paths, grad=True))

        paths, owner = self._paths(work, chosen)
        spans = self._spans(paths)
        sum_of_losses, found = torch.zeros(()), self._nothing(spans)
        results = abreast.together([partial(alone, engine, part) for engine, part in zip(self._beside(len(parts)), parts, strict=True)])
        for part, (loss, read, grads, _) in zip(parts, results, strict=True):
            places = set(part)
            at = _at(spans, [i for i, place in enumerate(owner) if place in places])
            for all_of_it, some in zip(found, read, strict=True):
                all_of_it[at] = some
            sum_of_losses += loss
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = _sum(parameter.grad, grad)
        self._saw(sum(fed for *_, fed in results), paths)
        return sum_of_losses, found

    def _two_passes(self, work: _Work, chosen: list[int], share: Tensor, paths: Paths, spans: list[range]) -> tuple[Tensor, list[Tensor]]:
        """The same when groups are spread over rows: the loss's gradient with respect to what is read first, then row by row."""
        found = self._nothing(spans)
        for indices, scores in self._passes(paths, grad=False):
            for all_of_it, part in zip(found, self._read(scores), strict=True):
                all_of_it[_at(spans, indices)] = part.detach().float().cpu()
        leaves = [f.requires_grad_() for f in found]
        loss = self._loss(work, chosen, share, leaves) if chosen else torch.zeros(())
        pulls = torch.autograd.grad(loss, leaves, allow_unused=True) if chosen else [None for _ in leaves]
        for indices, scores in self._passes(paths, grad=True):
            at, read = _at(spans, indices), self._read(scores)
            pulled = [(pull[at].to(part.device) * part).sum() for pull, part in zip(pulls, read, strict=True) if pull is not None]
            self._pull(torch.stack(pulled).sum() if indices else _nought(read))
        return loss.detach(), [leaf.detach() for leaf in leaves]

    def _nothing(self, spans: list[range]) -> list[Tensor]:
        """Room for what is read of some paths, on the CPU."""
        return [torch.zeros(spans[-1].stop if spans else 0) for _ in range(2 if self._place == "before" else 1)]

    def _mismatched(self, data: Data, chosen: Sequence[int]) -> Tensor | None:
        """Log-probabilities of the step's mismatched pairs under the model as it is, each process computing its share."""
        if "mismatched" not in self.objective.reads:
            return None
        paths = data.mismatched(chosen)
        mine = list(range(self.accelerator.process_index, len(paths), self.accelerator.num_processes))
        own = paths.select(mine)
        self._saw(sum(len(row.ids) for row in self.model.engine.plan(own)), own)
        found = torch.zeros(len(paths))
        for indices, scores in self._passes(own, grad=False):
            if indices:
                found[[mine[i] for i in indices]] = scores.path_logp.float().cpu()
        # each place is filled by one process, zero elsewhere
        return torch.stack(gathered(self.accelerator, found)).sum(0)

    def _saw(self, fed: int, paths: Paths) -> None:
        self._seen = (self._seen[0] + fed, self._seen[1] + sum(len(ids) for ids in paths.ids))

    def _figures(self, work: _Work, chosen: list[int], loss: Tensor, read: list[Tensor]) -> dict[str, float]:
        """Loss and the objective's metrics, summed or averaged over processes. Counts the tokens of the step too."""
        own: Mapping[str, float] = {}
        if chosen:
            own = self.objective.metrics(self._policy(work, chosen, read), work.reference.select(chosen) if work.reference is not None else None)
        said = gathered(self.accelerator, (float(loss), len(chosen), own, self._seen))
        self.tokens += sum(seen[0] for *_, seen in said)
        self.naive += sum(seen[1] for *_, seen in said)
        means = {}
        for name in sorted({name for _, _, values, _ in said for name in values}):
            known = [(values[name], n) for _, n, values, _ in said if name in values]
            means[name] = sum(value * n for value, n in known) / sum(n for _, n in known)
        return {"loss": sum(x for x, *_ in said)} | means

    def _reduce(self) -> None:
        """Adds up gradients over processes, where FSDP has not; a process without groups of its own takes part with zeros."""
        if self.accelerator.num_processes == 1:
            return
        for name, p in self.trainables.masters.items():
            if name not in self.trainables.shared_out:
                p.grad = total(self.accelerator, p.grad if p.grad is not None else torch.zeros_like(p))

    def _clip(self) -> float:
        """Scales the whole gradient down to the largest norm; gives the norm that it had."""
        weights, shared_out = self.trainables.masters, self.trainables.shared_out
        if not shared_out:
            return float(torch.nn.utils.clip_grad_norm_(self.trainables.parameters, self.options.clip))
        here = {name: torch.nn.utils.get_total_norm([p.grad]).square() for name, p in weights.items() if p.grad is not None}
        parts = torch.zeros((), device=self.model.device) + sum(square for name, square in here.items() if name in shared_out)
        norm = (total(self.accelerator, parts) + sum(square for name, square in here.items() if name not in shared_out)).sqrt()
        torch.nn.utils.clip_grads_with_norm_(weights.values(), self.options.clip, norm)
        return float(norm)


def _nought(read: Sequence[Tensor]) -> Tensor:
    """A loss of zero that has a gradient, of zero, with respect to all that was read."""
    return 0.0 * torch.stack([part.sum() for part in read]).sum()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which either may be missing."""
    return b if a is None else a if b is None else a + b


def _spread(rows: Sequence[Row], owner: Sequence[int]) -> bool:
    """Whether a group fills more than one row; `owner` is the group of each path."""
    return len({(owner[p], i) for i, row in enumerate(rows) for p in row.paths}) > len(set(owner))


def _at(spans: list[range], indices: Sequence[int]) -> Tensor:
    return torch.tensor([place for i in indices for place in spans[i]], dtype=torch.long)
