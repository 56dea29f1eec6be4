"""Optimizer steps: forward, backward and update on chosen groups, whatever the objective reads.

Losses are divided by the sum of the objective's `size` over the whole optimizer step, all rows and processes, so that 8 x 1, 4 x 2
and 1 x 8 give the same gradient. Several processes (torchrun, accelerate launch) each take their share of a step's groups, and the
gradients are added up. Where weights are shared out besides (FSDP), each pass needs every process, so all make as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fiducial.core.errors import FiducialError
from fiducial.core.roles import Objective
from fiducial.models.local import LocalModel
from fiducial.training import checkpoint, heldout
from fiducial.training.data import Data
from fiducial.training.heads import Heads
from fiducial.training.objective import GroupLogProbs, Step
from fiducial.training.options import TrainOptions
from fiducial.training.processes import gathered, total
from fiducial.training.row_passes import RowPasses, StepNoise, Work
from fiducial.training.scorecard import TOGETHER
from fiducial.training.weights import Trainables

if TYPE_CHECKING:
    from accelerate import Accelerator


APART, APART_16_BIT = 1e-4, 0.1
"""Nats per token, on average over a step, that rounding may put between two passes of one model, by the precision of its weights."""


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
        self.model, self.objective, self.options, self.accelerator = model, objective, options, accelerator
        self.heads = Heads(model, objective, seed=options.seed, costed=costed)
        self.trainables = Trainables(model.module, self.heads.weights)
        self.rate = options.learning_rate or objective.learning_rate * (10 if options.lora_rank else 1)
        """Peak learning rate."""
        self.optimizer = torch.optim.AdamW(self.trainables.parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True)
        self.steps = 0
        """Steps made."""
        self.tokens, self.naive = 0, 0
        """Tokens the network saw, and would have seen without sharing, over all processes."""
        self.passes = RowPasses(model, objective, self.heads, self.trainables, accelerator, temperature=temperature)

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
        self.passes.seen = (0, 0)
        everything = data.parts.select(chosen)
        # what the step's losses are divided by is known before anything is computed, on every process
        counted = float((everything.weight * self.objective.size(everything)).sum())
        share = everything.weight / (counted or 1.0)  # nothing to divide by when no group of the step counts
        mine = range(self.accelerator.process_index, len(chosen), self.accelerator.num_processes)
        own = [chosen[i] for i in mine]
        reference = replace(reference, mismatched=mismatched) if reference is not None else None
        noise = StepNoise(self.options.neftune, self.options.seed, self.steps, mine) if self.options.neftune else None
        work = Work(self.objective, data, reference, self.passes.mismatched(data, chosen), Step.of(everything), noise)
        loss, read = self.passes.backward(work, own, share[torch.tensor(list(mine), dtype=torch.long)])
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
        reference = replace(reference, mismatched=mismatched) if reference is not None else None
        work = Work(self.objective, data, reference, self.passes.mismatched(data, chosen), Step.of(data.parts))
        said = gathered(self.accelerator, (own, self.passes.forward(data.paths.select(data.paths_of(own)))))
        everything = [g for places, _ in said for g in places]
        policy = self.passes.policy(work, everything, [torch.cat(parts) for parts in zip(*(read for _, read in said), strict=True)])
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

    def _figures(self, work: Work, chosen: list[int], loss: Tensor, read: list[Tensor], *, begins: bool) -> dict[str, float]:
        """Loss and the objective's metrics of the whole step, from what all processes read. Counts the tokens of the step too.

        Where training `begins`, a policy that is not its reference is an error.
        """
        said = gathered(self.accelerator, (float(loss), chosen, read, self.passes.seen))
        self.tokens += sum(seen[0] for *_, seen in said)
        self.naive += sum(seen[1] for *_, seen in said)
        everything = [g for _, own, _, _ in said for g in own]
        policy = self.passes.policy(work, everything, [torch.cat(parts) for parts in zip(*(each for _, _, each, _ in said), strict=True)])
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
