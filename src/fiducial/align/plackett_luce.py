"""Plackett-Luce ranking.

What it does: fits a policy to rankings of two or more completions; with two it is DPO.
Use it when:  there are several completions per prompt and only their order is to be trusted. With rewards that mean amounts use align/exo.
Formula:      loss = -sum_k log(exp(s_k) / sum_{j = k or worse than k} exp(s_j)), s = beta * (log pi(y) - log pi_ref(y)) summed over tokens; without
              ties this is the probability of drawing the ranking from the best to the worst.
Defaults:     beta 0.1, learning rate 1e-6 as for align/dpo; labels from the groups' targets.
Limits:       amounts are ignored: a target of 0.9 ranks like one of 0.6. Completions that tie are not compared with one another; those without a
              reward take no part, and a group in which all tie has a loss of 0.
Source:       Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; Luce 1959, Individual Choice Behavior; Plackett 1975.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from fiducial.align.base import labelled, log_ratio, preference_metrics, scored
from fiducial.core.records import Group
from fiducial.core.roles import Objective
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class PlackettLuce(Objective):
    """Negative log-likelihood of a ranking under the log-ratios."""

    least: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Strength of the pull towards the reference; > 0."""
    labels: Literal["targets", "rewards"] = "targets"
    """What ranks the completions: targets or rewards."""

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.labels not in ("targets", "rewards"):
            raise ValueError(f"beta must be > 0 and labels targets or rewards, got {self.beta} and {self.labels}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G], in nats."""
        value, known = labelled(policy, self.labels, objective=self.name)
        score = self.beta * log_ratio(policy, reference, objective=self.name)
        worse = (value.unsqueeze(1) < value.unsqueeze(2)) & known.unsqueeze(1) & known.unsqueeze(2)  # [G, K, K]: column is worse than row
        rivals = worse | torch.eye(score.shape[1], dtype=torch.bool, device=score.device)
        total = score.unsqueeze(1).expand(rivals.shape).masked_fill(~rivals, -torch.inf).logsumexp(2)
        return (total - score).sum(1)

    def prepare(self, group: Group) -> Group:
        """The group without completions that have no label."""
        return scored(group) if self.labels == "rewards" else group

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """See `align.base.preference_metrics`."""
        score = self.beta * log_ratio(policy, reference, objective=self.name)
        return preference_metrics(score, policy, reference, better=policy.rewards if self.labels == "rewards" else policy.targets)
