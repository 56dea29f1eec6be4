"""Unlikelihood training.

What it does: makes good tokens likelier and bad tokens less likely. Which are which is said by a number for each part of a completion, or
              for the completion as a whole.
Use it when:  text is good in places and bad in others (a banned word, a leaked name, a wrong line), and the bad places are known. Where
              whole answers are compared, use align/dpo.
Formula:      loss = sum over tokens of (-log p_t if r_t >= threshold, else -alpha log(1 - p_t)), summed over the step and divided by its
              number of tokens; r_t is the value of the token's part, else the reward of its completion, else 1 for the preferred completion and
              -1 for another. The paper's score is s = -r.
Defaults:     threshold 0 (paper: 0 to 8e-4 on s), alpha 1 (paper: 1, or 0.01 where bad tokens are many), learning rate 2e-5 for fine-tuning
              (paper: 5e-4, from scratch).
Limits:       what should stand in the place of a bad token nobody says; high alpha makes text break off. Tokens of unknown value teach nothing.
Source:       Welleck et al. 2019, arXiv:1908.04319; with preferences Korbak et al. 2023, arXiv:2302.08582, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs

LEAST = 1e-20
"""Lower bound of 1 - p before its logarithm is taken."""


@final
@dataclass(frozen=True, slots=True)
class Unlikelihood(Objective):
    """Likelihood of good tokens, unlikelihood of bad ones."""

    reads: ClassVar[tuple[Reading, ...]] = ("tokens",)
    learning_rate: ClassVar[float] = 2e-5

    threshold: float = 0.0
    """Tokens of at least this value are good."""
    alpha: float = 1.0
    """Weight of bad tokens; >= 0."""

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {self.alpha}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, summed over tokens, [G]; the loop divides by the step's tokens of known value."""
        logp, value = policy.per_token, policy.known("value")
        avoided = -self.alpha * (-torch.expm1(logp)).clamp(min=LEAST).log()
        loss = torch.where(value >= self.threshold, -logp, avoided)
        return policy.summed(loss.where(~value.isnan(), 0)).sum(1)

    def size(self, groups: GroupLogProbs) -> Tensor:
        """Tokens of known value, [G]."""
        return groups.count("value")

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Mean log-probability of good and of bad tokens, and the share of bad ones."""
        logp, value = policy.per_token, policy.known("value")
        good, bad = logp[value >= self.threshold], logp[value < self.threshold]
        found = {"good_logp": good, "bad_logp": bad}
        shares = {"bad_share": len(bad) / (len(good) + len(bad))} if len(good) + len(bad) else {}
        return {name: float(part.mean()) for name, part in found.items() if len(part)} | shares
