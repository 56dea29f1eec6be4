"""Direct preference optimisation.

What it does: fits a policy to preference pairs, with no reward model and no sampling.
Use it when:  pairs exist and were drawn near the policy. Without a rejected answer use align/sft.
Formula:      z = beta * ((w - w_ref) - (l - l_ref)), with w = sum_t log pi(y_w[t] | x, y_w[<t]) and l likewise for y_l, in nats;
              loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z) + anchor * (-w / |y_w|), p = probability that the first is better.
Defaults:     beta 0.1, learning rate 1e-6 (paper, appendix B); anchor 0 is the paper's loss, anchor 1 is RPO (arXiv:2404.19733).
Limits:       the chosen response may itself lose probability (`displaced` in the metrics; an anchor stops it); sums favour short responses.
Source:       Rafailov et al. 2023, arXiv:2305.18290, eq. 7; soft labels: Mitchell 2023, cDPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.align.base import Pairs, pairs
from fiducial.core.roles import Objective
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class DPO(Objective):
    """Logistic loss on the difference of log-ratios."""

    least: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Strength of the pull towards the reference; > 0. Smaller moves further."""
    anchor: float = 0.0
    """Weight of the chosen response's negative log-likelihood per token; 1 keeps it from losing probability."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.anchor >= 0):
            raise ValueError(f"beta must be > 0 and anchor >= 0, got {self.beta} and {self.anchor}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G], in nats."""
        p = self._pairs(policy, reference)
        z = self.beta * (p.first - p.second)
        loss = -p.preference * F.logsigmoid(z) - (1 - p.preference) * F.logsigmoid(-z)
        if self.anchor:
            per_token = policy.logp / policy.length.clamp(min=1)
            loss = loss - self.anchor * (policy.targets * per_token).sum(1)
        return loss

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Accuracy, margin (in nats, times beta), mean log-ratios of preferred and other, share of pairs whose preferred lost probability."""
        p = self._pairs(policy, reference)
        swapped = p.preference < 0.5
        chosen, rejected = p.first.where(~swapped, p.second), p.second.where(~swapped, p.first)
        margin = chosen - rejected
        return {
            "accuracy": float((margin > 0).float().mean()),
            "margin": float(self.beta * margin.mean()),
            "chosen_ratio": float(chosen.mean()),
            "rejected_ratio": float(rejected.mean()),
            "displaced": float((chosen < 0).float().mean()),
        }

    def _pairs(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Pairs:
        if reference is None:
            raise ValueError("dpo needs reference log-probabilities")
        return pairs(policy, reference, objective=self.name)
