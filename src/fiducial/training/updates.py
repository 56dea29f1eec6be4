"""Optimizer steps: forward, backward and update on chosen groups, whatever the objective reads.

One row of the prefix-tree engine is in memory at a time, on a CPU one per thread. Losses couple the completions of one group only, so each row goes backward
on its own; a group that fills several rows takes two passes, the first without gradients, and is as exact. What couples a whole step
(mismatched pairs) carries no gradient and is computed before.

Losses are divided by the sum of the objective's `size` over the whole optimizer step, all rows and processes, so that 8 x 1, 4 x 2
and 1 x 8 give the same gradient. Several processes (torchrun, accelerate launch) each take their share of a step's groups, and the
gradients are added up. Where weights are shared out besides (FSDP), each pass needs every process, so all make as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fiducial.core.errors import FiducialError
from fiducial.core.records import digest
from fiducial.core.roles import Objective
from fiducial.models import abreast
from fiducial.models.forest import Paths, Row
from fiducial.models.local import LocalModel
from fiducial.models.noise import Noise
from fiducial.models.scoring import Engine, Scores
from fiducial.training import checkpoint, frozen, heldout
from fiducial.training.data import Data
from fiducial.training.heads import Heads
from fiducial.training.objective import GroupLogProbs, Step
from fiducial.training.options import TrainOptions
from fiducial.training.processes import gathered, total
from fiducial.training.scorecard import TOGETHER
from fiducial.training.sharding import IDLE
from fiducial.training.weights import Trainables

if TYPE_CHECKING:
    from accelerate import Accelerator


APART, APART_16_BIT = 1e-4, 0.1
"""Nats per token, on average over a step, that rounding may put between two passes of one model, by the precision of its weights."""
MOST_EACH = 1 << 30
"""Bytes of float32 gradients that each thread may have of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """The data of a step, and what holds for all of it."""

    data: Data
    reference: GroupLogProbs | None
    """Of all groups of the data."""
    mismatched: Tensor | None
    """Log-probabilities of the step's mismatched pairs, [M]."""
    step: Step | None = None
    """What couples its losses; without it the groups of each loss are taken for all of them."""
    places: Sequence[int] = ()
    """Of each group of this process its place among those of all, where it is learnt from."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some of this process's groups of a step, and the rows they are computed in."""

    places: list[int]
    """Which, among all of them."""
    chosen: list[int]
    """Which, in the data."""
    paths: Paths
    owner: list[int]
    """The group of each path, as an index into `chosen`."""
    rows: list[Row]
    noise: Noise | None
    """On the embeddings of its paths."""

    @property
    def fed(self) -> int:
        """Tokens the network sees."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def spread(self) -> bool:
        """Whether a group fills more than one row."""
        return len({(self.owner[p], i) for i, row in enumerate(self.rows) for p in row.paths}) > len(set(self.owner))


class Measured(NamedTuple):
    """What some groups show of a model, without learning from them."""

    each: heldout.Found
    """Loss (per token where that is how it is divided) and metrics of every group."""
    together: heldout.Together
    """What only all of them show."""


class Updates:
    """A model in training: its trainable weights, its optimizer, and the step that takes the data as an argument.

    `objective` may be replaced between steps by another that reads the same. Log-probabilities are of logits divided by `temperature`.
    When `costed`, an objective that reads values has a second head for the values of what answers cost.
    """

    def __init__(
        self, model: LocalModel, objective: Objective, options: TrainOptions, accelerator: Accelerator, *, temperature: float = 1.0, costed: bool = False
    ) -> None:
        self.model, self.objective, self.options, self.accelerator, self.temperature = model, objective, options, accelerator, temperature
        self.heads = Heads(model, objective, seed=options.seed, costed=costed)
        self.trainables = Trainables(model.module, self.heads.weights)
        self.rate = options.learning_rate or objective.learning_rate * (10 if options.lora_rank else 1)
        """Peak learning rate."""
        self.optimizer = torch.optim.AdamW(self.trainables.parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True)
        self.steps = 0
        """Steps made."""
        self.tokens, self.naive = 0, 0
        """Tokens the network saw, and would have seen without sharing, over all processes."""
        self._seen = (0, 0)
        self._engines: list[Engine] = []
        self._alone = False
        """Whether the model could not be copied for a second thread."""

    def step(self, data: Data, chosen: Sequence[int], *, rate: float, **given: Any) -> dict[str, float]:
        """One update on the chosen groups of `data`, with what else `gradient` is given, whose figures and errors are those of the step too."""
        figures = self.gradient(data, chosen, **given)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.step()
        self.trainables.publish()
        self.steps += 1
        return figures | {"learning_rate": rate}

    def gradient(
        self, data: Data, chosen: Sequence[int], *, reference: GroupLogProbs | None = None, mismatched: Tensor | None = None, begins_there: bool = False
    ) -> dict[str, float]:
        """Leaves the clipped gradient of a step with what the optimizer updates; figures are over the whole step and all processes.

        `reference` holds all groups of the data under the reference model, `mismatched` its log-probabilities of `data.mismatched(chosen)`;
        `begins_there`: it is the model as it was before the first update. Raises FiducialError when the loss is no longer a number, and before the
        first update where the model is not that reference; the model is as it was then.
        """
        self._seen = (0, 0)
        everything = data.parts.select(chosen)
        # what the step's losses are divided by is known before anything is computed, on every process
        counted = float((everything.weight * self.objective.size(everything)).sum())
        share = everything.weight / (counted or 1.0)  # nothing to divide by when no group of the step counts
        mine = range(self.accelerator.process_index, len(chosen), self.accelerator.num_processes)
        own = [chosen[i] for i in mine]
        held = replace(reference, mismatched=mismatched) if reference is not None else None
        work = _Work(data, held, self._mismatched(data, chosen), Step.of(everything), mine)
        loss, read = self._backward(work, own, share[torch.tensor(list(mine), dtype=torch.long)])
        self._reduce()
        norm = self._clip()
        figures = self._figures(work, own, loss, read, begins=begins_there and not self.steps) | {"grad_norm": norm}
        if not math.isfinite(figures["loss"]) or not math.isfinite(norm):
            rows = ", ".join(data.names[g] for g in chosen)
            raise FiducialError(f"the loss is no longer a number at step {self.steps + 1}; groups of the step: {rows}", hint="lower the learning rate")
        return figures

    @torch.no_grad()
    def measured(self, data: Data, *, reference: GroupLogProbs | None = None, mismatched: Tensor | None = None) -> Measured:
        """What `data` shows; nothing is learnt. Called by every process."""
        chosen = range(len(data.groups))
        own = list(chosen[self.accelerator.process_index :: self.accelerator.num_processes])
        work = _Work(data, replace(reference, mismatched=mismatched) if reference is not None else None, self._mismatched(data, chosen), Step.of(data.parts))
        said = gathered(self.accelerator, (own, self._forward(data.paths.select(data.paths_of(own)))))
        everything = [g for places, _ in said for g in places]
        policy = self._policy(work, everything, [torch.cat(parts) for parts in zip(*(read for _, read in said), strict=True)])
        held = work.reference.select(everything) if work.reference is not None else None
        back = sorted(chosen, key=lambda i: everything[i])

        def part(rows: Sequence[int]) -> tuple[GroupLogProbs, GroupLogProbs | None]:
            some = [back[i] for i in rows]
            return policy.select(some), held.select(some) if held is not None else None

        def alone(one: GroupLogProbs, under: GroupLogProbs | None) -> dict[str, float]:
            by = float(self.objective.size(one))
            metrics = {name: value for name, value in self.objective.metrics(one, under).items() if name not in TOGETHER}
            return ({"loss": float(self.objective(one, under)) / by} if by else {}) | metrics

        each = [alone(*part([i])) for i in chosen]
        return Measured(each, heldout.together(lambda rows: self.objective.metrics(*part(rows)), TOGETHER, len(chosen)))

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

    def keeping(self, data: Data, *, passes: float) -> AbstractContextManager[None]:
        """While inside, blocks below the lowest adapter are not run again for this data, which is gone through `passes` times; see `frozen.kept`."""
        # of several processes each would compute all of it for its share of the steps; under noise it is other states every time
        if self.accelerator.num_processes > 1 or self.options.neftune:
            return nullcontext()
        tokens = sum(map(len, data.paths.ids))
        count = abreast.threads(self.model.device, tokens // abreast.TOKENS_EACH) if self._divisible else 1
        return frozen.kept(self._beside(count), data.paths, passes=passes, keep_last=self.heads.place == "leaf")

    @property
    def _asked(self) -> dict[str, Any]:
        """What is asked of the engine."""
        return {"temperature": self.temperature, "hidden": self.heads.asked}

    def _read(self, scores: Scores) -> list[Tensor]:
        """What the objective reads of some paths, differentiable: log-probabilities or a head's scores per path, or both per token."""
        found = self.heads.read(scores)
        if self.heads.place == "leaf":
            return found
        return [scores.edge_logp if "tokens" in self.objective.reads else scores.path_logp, *found]

    def _spans(self, paths: Paths) -> list[range]:
        """Where what is read of each path stands in what is read of all."""
        return paths.spans() if "tokens" in self.objective.reads else [range(i, i + 1) for i in range(len(paths))]

    def _policy(self, work: _Work, chosen: Sequence[int], read: Sequence[Tensor]) -> GroupLogProbs:
        """What the objective sees. Labels and reference are on the CPU, and so few numbers are best put together there."""
        first, *more = (r.float().cpu() for r in read)
        groups = work.data.parts.select(chosen)
        if "tokens" in self.objective.reads:
            groups = groups.with_tokens(first, *more)
        elif self.heads.place == "leaf":
            groups = replace(groups, scores=work.data.place(chosen, first))
        else:
            groups = groups.with_logp(work.data.place(chosen, first))
        return replace(groups, mismatched=work.mismatched, step=work.step)

    def _loss(self, work: _Work, chosen: Sequence[int], share: Tensor, read: Sequence[Tensor]) -> Tensor:
        losses = self.objective(self._policy(work, chosen, read), work.reference.select(chosen) if work.reference is not None else None)
        return (share * losses).sum()

    def _passes(self, paths: Paths, *, grad: bool, rows: list[Row] | None = None, noise: Noise | None = None) -> Iterator[tuple[list[int], Scores]]:
        """The engine's rows, planned before or not. Where weights are shared out, rows of no path follow until every process has had as many."""
        rows = self._plan(paths, grad=grad, shared=noise is None) if rows is None else rows
        idle = max(gathered(self.accelerator, len(rows))) - len(rows) if self.trainables.shared_out else 0
        yield from self.model.engine.stream(paths, grad=grad, rows=rows, noise=noise, **self._asked)
        for _ in range(idle):
            for _, scores in self.model.engine.stream(IDLE, grad=grad, **self._asked):
                yield [], scores

    def _plan(self, paths: Paths, *, grad: bool, shared: bool = True) -> list[Row]:
        return self.model.engine.plan(paths, grad=grad, keep_last=self.heads.place == "leaf", shared=shared)

    def _pull(self, loss: Tensor) -> None:
        loss.backward()
        self.trainables.collect()

    def _backward(self, work: _Work, chosen: list[int], share: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Adds the gradient of `sum(share * loss)`; gives that sum and what was read of the chosen groups."""
        parts = self._parts(work, chosen)
        for part in parts:
            self._saw(part.fed, part.paths)
        if len(parts) > 1:
            return self._abreast(work, share, parts)
        (whole,) = parts
        if any(gathered(self.accelerator, whole.spread)) if self.trainables.shared_out else whole.spread:
            return self._two_passes(work, share, whole)
        return self._row_by_row(work, share, whole, self._passes(whole.paths, grad=True, rows=whole.rows, noise=whole.noise), self._pull)

    def _row_by_row(
        self, work: _Work, share: Tensor, whole: _Part, passes: Iterator[tuple[list[int], Scores]], pull: Callable[[Tensor], None]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same for rows that hold whole groups; `pull` takes each row's part of the loss."""
        chosen, owner, spans = whole.chosen, whole.owner, self._spans(whole.paths)
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

    def _part(self, work: _Work, chosen: list[int], places: Sequence[int]) -> _Part:
        own = [chosen[i] for i in places]
        paths = work.data.paths.select(work.data.paths_of(own))
        owner = [i for i, g in enumerate(own) for _ in work.data.groups[g].completions]
        noise = self._noise(work, chosen, places) if self.options.neftune else None
        return _Part(list(places), own, paths, owner, self._plan(paths, grad=True, shared=noise is None), noise)

    def _noise(self, work: _Work, chosen: Sequence[int], places: Sequence[int]) -> Noise:
        """That of the paths of some groups, by the place of the group in the step and of the completion in it: on however many processes they are
        run, and whenever, they get the same.
        """
        paths = [(work.places[i], k) for i in places for k in range(len(work.data.groups[chosen[i]].completions))]
        return Noise(self.options.neftune, [int(digest([self.options.seed, "noise", self.steps, *path])[:15], 16) for path in paths])

    def _parts(self, work: _Work, chosen: list[int]) -> list[_Part]:
        """The chosen groups, some for each thread; one part where threads do not pay, or a group fills several rows, which is left to `_two_passes`."""
        places = range(len(chosen))
        size = [sum(len(work.data.paths.ids[p]) for p in work.data.paths_of([g])) for g in chosen]
        count = abreast.threads(self.model.device, min(len(chosen), sum(size) // abreast.TOKENS_EACH)) if self._divisible else 1
        if count > 1 and len(self._beside(count)) == count:
            parts = [self._part(work, chosen, some) for some in abreast.divided(size, count)]
            if not any(part.spread for part in parts):
                return parts
        return [self._part(work, chosen, places)]

    @property
    def _divisible(self) -> bool:
        """Whether gradients are small enough for each thread to have its own."""
        return self.accelerator.num_processes == 1 and 4 * sum(master.numel() for master in self.trainables.parameters) <= MOST_EACH

    def _beside(self, count: int) -> list[Engine]:
        """An engine for each thread, around the same parameters; fewer where the model cannot be copied."""
        if len(self._engines) < count and not self._alone:
            self._engines = self.model.engine.team(count)
            self._alone = len(self._engines) < count
        return self._engines[:count]

    def _abreast(self, work: _Work, share: Tensor, parts: list[_Part]) -> tuple[Tensor, list[Tensor]]:
        """The same with a thread for each part; gradients are added in the order of the parts, so that every run adds alike."""
        parameters = list(self.trainables.named.values())

        def alone(engine: Engine, part: _Part) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
            grads: list[Tensor | None] = [None] * len(parameters)

            def pull(loss: Tensor) -> None:
                for i, grad in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                    grads[i] = _sum(grads[i], grad)

            passes = engine.stream(part.paths, grad=True, rows=part.rows, noise=part.noise, **self._asked)
            return *self._row_by_row(work, share[part.places], part, passes, pull), grads

        results = abreast.together([partial(alone, engine, part) for engine, part in zip(self._beside(len(parts)), parts, strict=True)])
        sum_of_losses, places = torch.zeros(()), []
        for part, (loss, _, grads) in zip(parts, results, strict=True):
            sum_of_losses += loss
            self.trainables.add(grads)
            # of each number that was read, the place of its group
            places += [part.places[group] for group, span in zip(part.owner, self._spans(part.paths), strict=True) for _ in span]
        back = torch.tensor(places).argsort(stable=True)
        return sum_of_losses, [torch.cat(column)[back] for column in zip(*(read for _, read, _ in results), strict=True)]

    def _two_passes(self, work: _Work, share: Tensor, whole: _Part) -> tuple[Tensor, list[Tensor]]:
        """The same when groups are spread over rows: the loss's gradient with respect to what is read first, then row by row."""
        chosen, paths, spans = whole.chosen, whole.paths, self._spans(whole.paths)
        leaves = [f.requires_grad_() for f in self._forward(paths, whole.noise)]
        loss = self._loss(work, chosen, share, leaves) if chosen else torch.zeros(())
        pulls = torch.autograd.grad(loss, leaves, allow_unused=True) if chosen else [None for _ in leaves]
        for indices, scores in self._passes(paths, grad=True, rows=whole.rows, noise=whole.noise):
            at, read = _at(spans, indices), self._read(scores)
            pulled = [(pull[at].to(part.device) * part).sum() for pull, part in zip(pulls, read, strict=True) if pull is not None]
            self._pull(torch.stack(pulled).sum() if indices else _nought(read))
        return loss.detach(), [leaf.detach() for leaf in leaves]

    def _forward(self, paths: Paths, noise: Noise | None = None) -> list[Tensor]:
        """What is read of some paths, without gradients."""
        spans = self._spans(paths)
        found = self._nothing(spans)
        for indices, scores in self._passes(paths, grad=False, noise=noise):
            for all_of_it, part in zip(found, self._read(scores), strict=True):
                all_of_it[_at(spans, indices)] = part.detach().float().cpu()
        return found

    def _nothing(self, spans: list[range]) -> list[Tensor]:
        """Room for what is read of some paths, on the CPU."""
        return [torch.zeros(spans[-1].stop if spans else 0) for _ in range(1 + len(self.heads.named) if self.heads.place == "before" else 1)]

    def _mismatched(self, data: Data, chosen: Sequence[int]) -> Tensor | None:
        """Log-probabilities of the step's mismatched pairs under the model as it is, each process computing its share."""
        if "mismatched" not in self.objective.reads:
            return None
        paths = data.mismatched(chosen)
        mine = list(range(self.accelerator.process_index, len(paths), self.accelerator.num_processes))
        own = paths.select(mine)
        rows = self._plan(own, grad=False)
        self._saw(sum(len(row.ids) for row in rows), own)
        found = torch.zeros(len(paths))
        for indices, scores in self._passes(own, grad=False, rows=rows):
            if indices:
                found[[mine[i] for i in indices]] = scores.path_logp.float().cpu()
        # each place is filled by one process, zero elsewhere
        return torch.stack(gathered(self.accelerator, found)).sum(0)

    def _saw(self, fed: int, paths: Paths) -> None:
        self._seen = (self._seen[0] + fed, self._seen[1] + sum(len(ids) for ids in paths.ids))

    def _figures(self, work: _Work, chosen: list[int], loss: Tensor, read: list[Tensor], *, begins: bool) -> dict[str, float]:
        """Loss and the objective's metrics of the whole step, from what all processes read. Counts the tokens of the step too.

        Where training `begins`, a policy that is not its reference is an error.
        """
        said = gathered(self.accelerator, (float(loss), chosen, read, self._seen))
        self.tokens += sum(seen[0] for *_, seen in said)
        self.naive += sum(seen[1] for *_, seen in said)
        everything = [g for _, own, _, _ in said for g in own]
        policy = self._policy(work, everything, [torch.cat(parts) for parts in zip(*(each for _, _, each, _ in said), strict=True)])
        held = work.reference.select(everything) if work.reference is not None else None
        if begins and held is not None:
            self._refuse_apart(policy, held)
        metrics = self.objective.metrics(policy, held)
        return {"loss": sum(x for x, *_ in said)} | metrics

    def _refuse_apart(self, policy: GroupLogProbs, held: GroupLogProbs) -> None:
        """Raises FiducialError where the policy is not its reference before the first update: all differences after that would be wrong."""
        apart = float((policy.logp - held.logp)[policy.mask].abs().sum() / policy.length[policy.mask].sum().clamp(min=1))
        exact = all(p.dtype == torch.float32 for p in self.model.module.parameters())
        if not apart <= (max(APART, self.model.engine.verdict.tolerance) if exact else APART_16_BIT):
            raise FiducialError(
                f"before the first update the policy is {apart:.2g} nats per token away from its reference, which is the same model",
                hint="something in it draws at random or is not what it was, such as dropout or a changed template: turn that off",
            )

    def _reduce(self) -> None:
        """Adds up gradients over processes, where FSDP has not; a process without groups of its own takes part with zeros."""
        if self.accelerator.num_processes == 1:
            return
        for name, p in self.trainables.masters.items():
            if name not in self.trainables.shared_out:
                p.grad = total(self.accelerator, p.grad if p.grad is not None else torch.zeros_like(p))

    def _clip(self) -> float:
        """Scales the whole gradient down to the largest norm, where it is longer; gives the norm that it had."""
        weights, shared_out = self.trainables.masters, self.trainables.shared_out
        here = {name: p.grad for name, p in weights.items() if p.grad is not None}
        if not shared_out:
            norm = torch.nn.utils.get_total_norm(here.values())
        else:
            squares = {name: torch.nn.utils.get_total_norm([grad]).square() for name, grad in here.items()}
            parts = torch.zeros((), device=self.model.device) + sum(square for name, square in squares.items() if name in shared_out)
            norm = (total(self.accelerator, parts) + sum(square for name, square in squares.items() if name not in shared_out)).sqrt()
        if not norm <= self.options.clip:  # torch would multiply by 1 otherwise, which is a pass through all of it
            torch.nn.utils.clip_grads_with_norm_(weights.values(), self.options.clip, norm)
        return float(norm)


def _nought(read: Sequence[Tensor]) -> Tensor:
    """A loss of zero that has a gradient, of zero, with respect to all that was read."""
    return 0.0 * torch.stack([part.sum() for part in read]).sum()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which either may be missing; in float32."""
    return b if a is None else a if b is None else a.float() + b


def _at(spans: list[range], indices: Sequence[int]) -> Tensor:
    return torch.tensor([place for i in indices for place in spans[i]], dtype=torch.long)
