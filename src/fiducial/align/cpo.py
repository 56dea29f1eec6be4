"""Contrastive preference optimisation.

What it does: fits a policy to preference pairs without a reference model: a logistic loss on the difference of log-probabilities, plus
              the negative log-likelihood of the preferred completion.
Use it when:  the point is where the model decides between two answers (refuse or comply), and the policy may move far from its base.
              To stay close to a reference use align/dpo.
Formula:      loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z) + anchor * (-w / |y_w|), z = beta * (w - l), with
              w = sum_t log pi(y_w[t] | x, y_w[<t]) and l likewise for y_l, in nats; groups of one completion have the last term alone.
              With mean=token the last term of a step is anchor times minus the sum over its preferred tokens, divided by their number.
Defaults:     beta 0.1 (paper), anchor 1.0 (paper), learning rate 1e-6 as for align/dpo.
Limits:       nothing holds the policy to the base model but the anchor; sums favour short responses. TRL takes the anchor with mean=token.
Source:       Xu et al. 2024, arXiv:2401.08417, eq. 6; the same pair term with beta 1 is logistic regression on the two answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch.nn.functional as F
from torch import Tensor

from fiducial.align.base import Mean, PairObjective, likelihood
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class CPO(PairObjective):
    """Logistic loss on the difference of log-probabilities, with an anchor."""

    least: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Sharpness of the contrast; > 0."""
    anchor: float = 1.0
    """Weight of the preferred completion's negative log-likelihood per token; >= 0."""
    mean: Mean = "sequence"
    """What counts alike in the anchor: each completion (the paper), or each token of a step, so that long ones count more."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.anchor >= 0) or self.mean not in get_args(Mean):
            raise ValueError(f"beta must be > 0, anchor >= 0 and mean sequence or token, got {self.beta}, {self.anchor} and {self.mean}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G], in nats."""
        return self.contrast(policy) - self.anchor * likelihood(policy, self.mean)

    def score(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Beta times the log-probability, [G, K]."""
        return self.beta * policy.logp

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Logistic loss on the margin, [G]."""
        return -F.logsigmoid(better - worse)
