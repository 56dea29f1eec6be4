"""Robust DPO: preferences of which a known share is flipped.

What it does: fits pairs with a loss whose expectation, over labels flipped at a known rate, is the DPO loss on the true labels.
Use it when:  the share of wrong labels is known, for example a judge's error rate from its card. When it is a guess, use
              align/dpo with label_smoothing, which stops by itself.
Formula:      loss = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e), z as in align/dpo, e = label_smoothing.
Defaults:     label_smoothing 0.1, beta 0.1, learning rate 1e-6 as for align/dpo.
Limits:       the loss has no minimum: it falls without bound as the margin grows, so watch the margin and train for one epoch. A flip
              changes it by z / (1 - 2e), so its variance over flips is e (1 - e) z^2 / (1 - 2e)^2.
Source:       Chowdhury et al. 2024, arXiv:2403.00409, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.align.base import PairObjective


@final
@dataclass(frozen=True, slots=True)
class RobustDPO(PairObjective):
    """Logistic loss that is unbiased under flipped labels."""

    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Strength of the pull towards the reference; > 0."""
    label_smoothing: float = 0.1
    """Share of labels that are flipped, in [0, 0.5); 0 is DPO."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and 0 <= self.label_smoothing < 0.5):
            raise ValueError(f"beta must be > 0 and label_smoothing in [0, 0.5), got {self.beta} and {self.label_smoothing}")

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Loss on the margin, [G]; below 0 for large margins."""
        z, e = better - worse, self.label_smoothing
        return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)
