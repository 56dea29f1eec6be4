"""Direct preference optimisation.

What it does: fits a policy to preference pairs, with no reward model and no sampling.
Use it when:  pairs exist and were drawn near the policy. Without a rejected answer use align/sft; with more than two per prompt align/exo.
Formula:      z = beta * ((w - w_ref) - (l - l_ref)), with w = sum_t log pi(y_w[t] | x, y_w[<t]) and l likewise for y_l, in nats;
              loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z) + anchor * (-w / |y_w|), p = probability that the first is better,
              shrunk to p (1 - e) + (1 - p) e by label smoothing e.
Defaults:     beta 0.1, learning rate 1e-6 (paper, appendix B); anchor 0 and label_smoothing 0 are the paper's loss, anchor 1 is RPO
              (arXiv:2404.19733), label_smoothing above 0 is cDPO, whose margin settles at logit(1 - e) / beta. Soft labels are taken as they are
              given, up to 0 and 1.
Limits:       the chosen response may itself lose probability (`displaced` in the metrics; an anchor stops it); sums favour short responses.
Source:       Rafailov et al. 2023, arXiv:2305.18290, eq. 7; soft labels: Mitchell 2023, cDPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.align.base import PairObjective, likelihood
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class DPO(PairObjective):
    """Logistic loss on the difference of log-ratios."""

    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Strength of the pull towards the reference; > 0. Smaller moves further."""
    anchor: float = 0.0
    """Weight of the chosen response's negative log-likelihood per token; 1 keeps it from losing probability."""
    label_smoothing: float = 0.0
    """Share of labels believed to be wrong, in [0, 0.5); stops the margin from growing without end."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.anchor >= 0 and 0 <= self.label_smoothing < 0.5):
            given = f"{self.beta}, {self.anchor} and {self.label_smoothing}"
            raise ValueError(f"beta must be > 0, anchor >= 0 and label_smoothing in [0, 0.5), got {given}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G], in nats."""
        loss = self.contrast(policy, reference)
        return loss - self.anchor * likelihood(policy) if self.anchor else loss

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Cross-entropy of the smoothed label, [G]."""
        z = better - worse
        return -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)
