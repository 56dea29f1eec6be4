"""DPO-positive: the preferred response may not lose probability.

What it does: DPO with a penalty, inside the logistic, on the preferred response's loss of probability against the reference.
Use it when:  the two responses differ in few tokens, where DPO lowers both. With long, different responses align/dpo with an anchor does.
Formula:      loss = -log sigmoid(z - beta * penalty * max(0, w_ref - w)), z and w as in align/dpo; a soft label takes the mean of both sides.
Defaults:     penalty 5: each nat that the preferred response loses weighs as much as five of margin; beta 0.1, learning rate 1e-6 as for
              align/dpo.
Limits:       nothing acts on a preferred response that has gained, so it can fall back to where it was; the gradient jumps at that point.
Source:       Pal et al. 2024, arXiv:2402.13228 (penalty is lambda there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.align.base import PairObjective


@final
@dataclass(frozen=True, slots=True)
class DPOP(PairObjective):
    """Logistic loss on a margin that the preferred response's losses count against."""

    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Strength of the pull towards the reference; > 0."""
    penalty: float = 5.0
    """Weight of the preferred response's loss of probability; >= 0, and 0 is DPO."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.penalty >= 0):
            raise ValueError(f"beta must be > 0 and penalty >= 0, got {self.beta} and {self.penalty}")

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Logistic loss on the penalised margin, [G]."""
        return -F.logsigmoid(better - worse - self.penalty * (-better).relu())
