"""Reward-weighted regression (RWR).

What it does: imitates all completions, each token weighted by the exponential of its reward: supervised fine-tuning in which good text counts
              more.
Use it when:  text with rewards is at hand and nothing should be made less likely, only learnt less. Where bad text is to be unlearnt, use
              align/unlikelihood; where rewards of one prompt are compared, align/exo.
Formula:      loss = -sum over tokens of min(exp(r_t / beta), 1000) log p_t, summed over the step and divided by its number of tokens; r_t is
              the value of the token's part, else the reward of its completion, else 1 for the preferred completion and -1 for another.
Defaults:     beta 1 for rewards of the order of 1 (paper: 1 or 10 on scores of at most 0), learning rate 2e-5 for fine-tuning (paper: 1e-3 to
              5e-4, from scratch).
Limits:       weights depend on the scale of the rewards; a small beta leaves few tokens that count. Tokens of unknown reward teach nothing.
Source:       Peters and Schaal 2007, "Reinforcement learning by reward-weighted regression"; Korbak et al. 2023, arXiv:2302.08582, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fiducial.align.base import reward_weights
from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class RWR(Objective):
    """Negative log-likelihood weighted by exponential rewards."""

    reads: ClassVar[tuple[Reading, ...]] = ("tokens",)
    learning_rate: ClassVar[float] = 2e-5

    beta: float = 1.0
    """Reward that multiplies the weight by e; > 0."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, summed over tokens, [G]; the loop divides by the step's tokens of known reward."""
        weight = reward_weights(policy.known("value"), self.beta)
        return -policy.summed(weight * policy.per_token).sum(1)

    def size(self, groups: GroupLogProbs) -> Tensor:
        """Tokens of known reward, [G]."""
        return groups.count("value")

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Mean log-probability and mean weight per token."""
        weight = reward_weights(policy.known("value"), self.beta)
        return {"logp_per_token": float(policy.per_token.mean()), "token_weight": float(weight.mean())}
