"""Process and outcome reward models.

What it does: trains a linear head to say, at the last token of each step of a solution, whether the steps so far are right. All prefixes
              of a solution are scored in one pass.
Use it when:  solutions have steps that can be checked one by one, to choose among samples or as a reward; where only final answers can be
              checked, with labels outcome. Read it with align/learned_reward.
Formula:      loss = -y log sigmoid(r) - (1 - y) log sigmoid(-r), mean over the steps of the optimizer step. process: y is the step's value
              in [0, 1]; what comes after the first step of value 0 is not supervised. outcome: at every step, y = 1 if the solution's
              reward is above 0, else 0.
Defaults:     labels process, learning rate 1e-5 as align/reward_model. Neutral steps count as right (paper): give them the value 1.
Limits:       steps are the parts of a completion (`ends`, `values`; read from TRL's stepwise columns and PRM800K); one without any has one step,
              the whole, under outcome, and teaches nothing under process. The product over steps punishes long solutions.
              One number is learnt, not the paper's three classes, and outcome labels stand at the ends of steps, where the paper has them at every
              token. Solutions are taken as they come; align/step_labels can choose convincing wrong ones to label, as the paper does.
Source:       Lightman et al. 2023, arXiv:2305.20050, section 2; soft labels and the minimum: Wang et al. 2023, arXiv:2312.08935.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Group
from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs

RIGHT = 0.5
"""Least value of a right step."""


@final
@dataclass(frozen=True, slots=True)
class ProcessReward(Objective):
    """Binary cross-entropy at the end of each step."""

    reads: ClassVar[tuple[Reading, ...]] = ("scores",)
    higher_is: ClassVar[Literal["better", "worse"]] = "better"

    labels: Literal["process", "outcome"] = "process"
    """What steps are held against: their own values, or the reward of the whole solution."""

    def __post_init__(self) -> None:
        if self.labels not in ("process", "outcome"):
            raise ValueError(f"labels must be process or outcome, got {self.labels}")

    @property
    def learns_from(self) -> str:
        """The labels, by which align/learned_reward reads the steps."""
        return self.labels

    def prepare(self, group: Group) -> Group:
        """The group of all supervised prefixes, each ending with a step and open, with the step's label as its reward."""
        steps = [step for k, c in enumerate(group.completions) for step in self._steps(c, group.rewards[k] if group.rewards is not None else None)]
        return group.model_copy(update={"completions": tuple(c for c, _ in steps), "rewards": tuple(y for _, y in steps), "targets": None})

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, summed over steps, [G]; the loop divides by the steps of all groups."""
        losses = F.binary_cross_entropy_with_logits(policy.given_scores, policy.rewards.nan_to_num(0.0), reduction="none")
        return losses.where(policy.mask, 0).sum(1)

    def size(self, groups: GroupLogProbs) -> Tensor:
        """Supervised steps, [G]."""
        return groups.mask.sum(1).float()

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Share of steps on whose side the score is, and share of right steps."""
        right = policy.rewards[policy.mask] >= RIGHT
        said = policy.given_scores[policy.mask] >= 0
        return {"accuracy": float((said == right).float().mean()), "right_steps": float(right.float().mean())}

    def _steps(self, solution: Completion, reward: float | None) -> list[tuple[Completion, float]]:
        ends = solution.ends or ((len(solution.text),) if self.labels == "outcome" else ())
        found = []
        for end, value in zip(ends, solution.values or (None,) * len(ends), strict=True):
            label = value if self.labels == "process" else None if reward is None else float(reward > 0)
            if label is None:
                continue
            if not 0 <= label <= 1:
                raise DataError(f"a step has the value {label}", hint="values of steps are probabilities of being right, from 0 to 1")
            found.append((Completion(text=solution.text[:end], finish="length"), label))
            if self.labels == "process" and label == 0:  # a low share of right continuations is no error yet
                break
        return found
