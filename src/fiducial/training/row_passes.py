"""What an objective reads of a model, and the gradient of its loss: forward and backward passes, row by row.

One row of the prefix-tree engine is in memory at a time, on a CPU one per thread. Losses couple the completions of one group only, so each row goes backward
on its own; a group that fills several rows takes two passes, the first without gradients, and is as exact. What couples a whole step
(mismatched pairs) carries no gradient and is computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fiducial.core.records import digest
from fiducial.core.roles import Objective
from fiducial.models import abreast
from fiducial.models.forest import Paths, Row
from fiducial.models.local import LocalModel
from fiducial.models.noise import Noise
from fiducial.models.scoring import Engine, Scores
from fiducial.training import frozen
from fiducial.training.data import Data
from fiducial.training.heads import Heads
from fiducial.training.objective import GroupLogProbs, Step
from fiducial.training.processes import gathered
from fiducial.training.sharding import IDLE
from fiducial.training.weights import Trainables

if TYPE_CHECKING:
    from accelerate import Accelerator


MOST_EACH = 1 << 30
"""Bytes of float32 gradients that each thread may have of its own."""


@dataclass(frozen=True, slots=True)
class StepNoise:
    """Noise on the embeddings of all paths of a step."""

    alpha: float
    seed: int
    step: int
    places: Sequence[int]
    """Of each group of this process its place among those of the step."""

    def on(self, completions: Sequence[tuple[int, int]]) -> Noise:
        """That of the paths of some groups of this process, a pair of numbers for each: which of the groups, and how many completions it has. It goes by
        the place of the group in the step and of the completion in it: on however many processes they are run, and whenever, they get the same.
        """
        paths = [(self.places[group], k) for group, count in completions for k in range(count)]
        return Noise(self.alpha, [int(digest([self.seed, "noise", self.step, *path])[:15], 16) for path in paths])


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The data of a step, and what holds for all of it."""

    objective: Objective
    """Whose loss is taken."""
    data: Data
    reference: GroupLogProbs | None
    """Of all groups of the data."""
    mismatched: Tensor | None
    """Log-probabilities of the step's mismatched pairs, [M]."""
    step: Step | None = None
    """What couples its losses; without it the groups of each loss are taken for all of them."""
    noise: StepNoise | None = None


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


class RowPasses:
    """Passes of a model in training over groups of this process; where weights are shared out, every process calls along.

    The objective of each `Work` reads what `objective` reads. Log-probabilities are of logits divided by `temperature`.
    """

    def __init__(self, model: LocalModel, objective: Objective, heads: Heads, trainables: Trainables, accelerator: Accelerator, *, temperature: float) -> None:
        self.model, self.heads, self.trainables, self.accelerator, self.temperature = model, heads, trainables, accelerator, temperature
        self.per_token, self.mispaired = "tokens" in objective.reads, "mismatched" in objective.reads
        self.seen = (0, 0)
        """Tokens this process's network saw in the step, and would have seen without sharing."""
        self._engines: list[Engine] = []
        self._alone = False
        """Whether the model could not be copied for a second thread."""

    def backward(self, work: Work, chosen: list[int], share: Tensor) -> tuple[Tensor, list[Tensor]]:
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

    def forward(self, paths: Paths, noise: Noise | None = None) -> list[Tensor]:
        """What is read of some paths, without gradients."""
        spans = self._spans(paths)
        found = self._nothing(spans)
        for indices, scores in self._passes(paths, grad=False, noise=noise):
            for all_of_it, part in zip(found, self._read(scores), strict=True):
                all_of_it[_at(spans, indices)] = part.detach().float().cpu()
        return found

    def mismatched(self, data: Data, chosen: Sequence[int]) -> Tensor | None:
        """Log-probabilities of the step's mismatched pairs under the model as it is, each process computing its share."""
        if not self.mispaired:
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

    def policy(self, work: Work, chosen: Sequence[int], read: Sequence[Tensor]) -> GroupLogProbs:
        """What the objective sees. Labels and reference are on the CPU, and so few numbers are best put together there."""
        first, *more = (r.float().cpu() for r in read)
        groups = work.data.parts.select(chosen)
        if self.per_token:
            groups = groups.with_tokens(first, *more)
        elif self.heads.place == "leaf":
            groups = replace(groups, scores=work.data.place(chosen, first))
        else:
            groups = groups.with_logp(work.data.place(chosen, first))
        return replace(groups, mismatched=work.mismatched, step=work.step)

    def keeping(self, data: Data, *, passes: float) -> AbstractContextManager[None]:
        """While inside, blocks below the lowest adapter are not run again for this data, which is gone through `passes` times; see `frozen.kept`."""
        if self.accelerator.num_processes > 1:  # each would compute all of it for its share of the steps
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
        return [scores.edge_logp if self.per_token else scores.path_logp, *found]

    def _spans(self, paths: Paths) -> list[range]:
        """Where what is read of each path stands in what is read of all."""
        return paths.spans() if self.per_token else [range(i, i + 1) for i in range(len(paths))]

    def _loss(self, work: Work, chosen: Sequence[int], share: Tensor, read: Sequence[Tensor]) -> Tensor:
        losses = work.objective(self.policy(work, chosen, read), work.reference.select(chosen) if work.reference is not None else None)
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

    def _row_by_row(
        self, work: Work, share: Tensor, whole: _Part, passes: Iterator[tuple[list[int], Scores]], pull: Callable[[Tensor], None]
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

    def _part(self, work: Work, chosen: list[int], places: Sequence[int]) -> _Part:
        own = [chosen[i] for i in places]
        paths = work.data.paths.select(work.data.paths_of(own))
        owner = [i for i, g in enumerate(own) for _ in work.data.groups[g].completions]
        noise = work.noise.on([(i, len(work.data.groups[chosen[i]].completions)) for i in places]) if work.noise is not None else None
        return _Part(list(places), own, paths, owner, self._plan(paths, grad=True, shared=noise is None), noise)

    def _parts(self, work: Work, chosen: list[int]) -> list[_Part]:
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

    def _abreast(self, work: Work, share: Tensor, parts: list[_Part]) -> tuple[Tensor, list[Tensor]]:
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

    def _two_passes(self, work: Work, share: Tensor, whole: _Part) -> tuple[Tensor, list[Tensor]]:
        """The same when groups are spread over rows: the loss's gradient with respect to what is read first, then row by row."""
        chosen, paths, spans = whole.chosen, whole.paths, self._spans(whole.paths)
        leaves = [f.requires_grad_() for f in self.forward(paths, whole.noise)]
        loss = self._loss(work, chosen, share, leaves) if chosen else torch.zeros(())
        pulls = torch.autograd.grad(loss, leaves, allow_unused=True) if chosen else [None for _ in leaves]
        for indices, scores in self._passes(paths, grad=True, rows=whole.rows, noise=whole.noise):
            at, read = _at(spans, indices), self._read(scores)
            pulled = [(pull[at].to(part.device) * part).sum() for pull, part in zip(pulls, read, strict=True) if pull is not None]
            self._pull(torch.stack(pulled).sum() if indices else _nought(read))
        return loss.detach(), [leaf.detach() for leaf in leaves]

    def _nothing(self, spans: list[range]) -> list[Tensor]:
        """Room for what is read of some paths, on the CPU."""
        return [torch.zeros(spans[-1].stop if spans else 0) for _ in range(1 + len(self.heads.named) if self.heads.place == "before" else 1)]

    def _saw(self, fed: int, paths: Paths) -> None:
        self.seen = (self.seen[0] + fed, self.seen[1] + sum(len(ids) for ids in paths.ids))


def _nought(read: Sequence[Tensor]) -> Tensor:
    """A loss of zero that has a gradient, of zero, with respect to all that was read."""
    return 0.0 * torch.stack([part.sum() for part in read]).sum()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which either may be missing; in float32."""
    return b if a is None else a if b is None else a.float() + b


def _at(spans: list[range], indices: Sequence[int]) -> Tensor:
    return torch.tensor([place for i in indices for place in spans[i]], dtype=torch.long)
