"""Identity preference optimisation.

What it does: fits preference pairs by a squared loss that asks for a fixed margin, so that labels without noise are not overfitted.
Use it when:  DPO drives margins ever further apart: few pairs, many epochs, labels that never disagree.
Formula:      loss = (h - 1 / (2 beta))^2, h = (w - w_ref) / |y_w| - (l - l_ref) / |y_l| in nats per token, with w, l as in align/dpo;
              without length_normalized h is the difference of sums. A soft label p settles at h = (2p - 1) / (2 beta).
Defaults:     beta 0.1; length_normalized, as its authors run it and as TRL does: 5 nats per token of margin. OpenRLHF takes sums, with
              which the same beta is another objective. Learning rate 1e-6 as for align/dpo.
Limits:       the gradient is linear in the distance from the target: long responses compared by sums can start far away from it.
Source:       Azar et al. 2023, arXiv:2310.12036, eq. 17 (beta is tau there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fiducial.align.base import PairObjective, log_ratio, per_token
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class IPO(PairObjective):
    """Squared distance of the difference of log-ratios from a fixed margin."""

    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Strength of the pull towards the reference; > 0. The margin asked for is 1 / (2 beta)."""
    length_normalized: bool = True
    """Whether log-ratios are divided by the completion's tokens."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")

    def score(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Log-ratio, per token or summed, [G, K]."""
        ratio = log_ratio(policy, reference, objective=self.name)
        return per_token(ratio, policy) if self.length_normalized else ratio

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Squared distance from the margin, [G]."""
        return (better - worse - 1 / (2 * self.beta)).square()
