"""Advantage-weighted regression (AWR).

What it does: reward-weighted regression in which only what a token's reward has above expectation counts. A linear head on the state before
              each token learns the expectation alongside.
Use it when:  as align/rwr, where rewards differ much from text to text, so that the mere kind of a text would decide its weight.
Formula:      loss = sum over tokens of -(1 - value_weight) min(exp(A_t / beta), 1000) log p_t + value_weight (r_t - V_t)^2, with
              A_t = r_t - stop(V_t), V_t the head before the token; divided by the step's number of tokens. r_t as in align/rwr.
Defaults:     value_weight 0.5 (paper: 0.5, or 0.95 where scores are rare), beta 1 for rewards of the order of 1, learning rate 2e-5.
Limits:       V is linear here (paper: bounded, for scores from -1 to 0), and its loss moves the model too. See align/rwr for the rest.
Source:       Peng et al. 2019, arXiv:1910.00177; with language models Korbak et al. 2023, arXiv:2302.08582, section 2.
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
class AWR(Objective):
    """Negative log-likelihood weighted by exponential advantages, and the error of the expected reward."""

    reads: ClassVar[tuple[Reading, ...]] = ("tokens", "values")
    learning_rate: ClassVar[float] = 2e-5

    beta: float = 1.0
    """Advantage that multiplies the weight by e; > 0."""
    value_weight: float = 0.5
    """Share of the head's loss, in [0, 1)."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and 0 <= self.value_weight < 1):
            raise ValueError(f"beta must be > 0 and value_weight in [0, 1), got {self.beta} and {self.value_weight}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, summed over tokens, [G]; the loop divides by the step's tokens of known reward."""
        reward, values = policy.known("value"), policy.values
        weight = reward_weights(reward - values.detach(), self.beta)
        error = (reward.where(~reward.isnan(), values.detach()) - values).square()
        return policy.summed(self.value_weight * error - (1 - self.value_weight) * weight * policy.per_token).sum(1)

    def size(self, groups: GroupLogProbs) -> Tensor:
        """Tokens of known reward, [G]."""
        return groups.count("value")

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Mean log-probability and mean weight per token, and the mean squared error of the expected reward."""
        reward, values = policy.known("value"), policy.values
        error = (reward - values).square()[~reward.isnan()]
        weight = reward_weights(reward - values, self.beta)
        found = {"logp_per_token": policy.per_token, "token_weight": weight} | ({"value_error": error} if len(error) else {})
        return {name: float(part.mean()) for name, part in found.items()}
