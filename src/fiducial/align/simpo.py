"""Simple preference optimisation.

What it does: fits preference pairs by the mean log-probability per token, with a margin to reach and without a reference model.
Use it when:  answers differ in length and the sums of align/dpo favour the short ones, or memory forbids a reference.
Formula:      loss = -log sigmoid(beta * (w / |y_w| - l / |y_l|) - gamma), gamma = beta * gamma_beta_ratio, with w, l as in align/dpo but no
              reference; a soft label takes the mean of both sides.
Defaults:     beta 2.0, gamma_beta_ratio 0.5, learning rate 6e-7: the authors' settings for a base model of 8 billion weights. They tune beta
              in 2 to 10 and the ratio in 0 to 1.
Limits:       nothing holds the policy to where it was: learning rates of 1e-5 destroy the model, and skills such as arithmetic are lost.
Source:       Meng et al. 2024, arXiv:2405.14734, eq. 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.align.base import PairObjective, per_token
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class SimPO(PairObjective):
    """Logistic loss on the difference of mean log-probabilities, less a margin."""

    needs_reference: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 6e-7

    beta: float = 2.0
    """Sharpness of the contrast; > 0."""
    gamma_beta_ratio: float = 0.5
    """Margin to reach, in nats per token; >= 0."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.gamma_beta_ratio >= 0):
            raise ValueError(f"beta must be > 0 and gamma_beta_ratio >= 0, got {self.beta} and {self.gamma_beta_ratio}")

    def score(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Beta times the mean log-probability per token, [G, K]."""
        return self.beta * per_token(policy.logp, policy)

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Logistic loss on the margin less gamma, [G]."""
        return -F.logsigmoid(better - worse - self.beta * self.gamma_beta_ratio)
