"""Cost model of safe reinforcement learning.

What it does: trains a linear head on the model's last hidden state to score how harmful an answer is: positive for an unsafe one, negative
              for a safe one, and higher for the worse of two.
Use it when:  harm is to be a limit beside a reward, not a part of it. Read it with align/learned_reward --higher-is worse.
Formula:      for a pair with cost C, p = probability that i is the less harmful one: -p log sigmoid(C_j - C_i) - (1 - p) log sigmoid(C_i - C_j),
              mean over the pairs of a prompt, plus sign_weight * mean over its completions of -log sigmoid(s C), s = 1 for an unsafe
              completion (reward below 0), -1 for a safe one (reward above 0), 0 without a reward.
Defaults:     sign_weight 2 with this mean is the paper's sum over a pair; learning rate 1e-5 as align/reward_model.
Limits:       a safe answer can be the more harmful one of two safe ones; give targets that compare harm, not helpfulness. The 1 and 0 that a
              preference without scores stands for are no signs: say what is safe by rewards of 1 and -1 (columns score_chosen, score_rejected).
Source:       Dai et al. 2023, arXiv:2310.12773, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.core.records import Group
from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs, shares, unscored
from fiducial.training.scorecard import comparisons, difference, figures, pair_mean


@final
@dataclass(frozen=True, slots=True)
class CostModel(Objective):
    """Logistic losses on differences and on signs of scores."""

    reads: ClassVar[tuple[Reading, ...]] = ("scores",)
    higher_is: ClassVar[Literal["better", "worse"]] = "worse"

    sign_weight: float = 2.0
    """Weight of the mean loss on signs; >= 0."""

    def __post_init__(self) -> None:
        if not self.sign_weight >= 0:
            raise ValueError(f"sign_weight must be >= 0, got {self.sign_weight}")

    def prepare(self, group: Group) -> Group:
        """A pair without rewards that are but a preference, 1 for the chosen and 0 for the rejected answer: the better one need not be safe."""
        if len(group.completions) == 1 or not unscored(group):
            return group
        return group.model_copy(update={"targets": tuple(shares(group)), "rewards": None})

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G]."""
        cost = policy.given_scores
        pairs = comparisons(policy, "targets")
        d, p = -difference(cost), pairs.preference
        unsafe = -_safe(policy)
        signs = (-F.logsigmoid(unsafe * cost)).where(unsafe != 0, 0).sum(1) / (unsafe != 0).sum(1).clamp(min=1)
        return pair_mean(-p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d), pairs.known) + self.sign_weight * signs

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Figures of `fiducial.training.scorecard` for minus the cost, and the share of completions on the right side of 0."""
        cost, safe = policy.given_scores, _safe(policy)
        right = ((cost * -safe) > 0).float()[safe != 0]
        return figures(-cost, policy, "targets") | ({"sign_accuracy": float(right.mean())} if len(right) else {})


def _safe(groups: GroupLogProbs) -> Tensor:
    """1 for a safe completion, -1 for an unsafe one, 0 where nobody said, [G, K]."""
    return groups.rewards.nan_to_num(0.0).sign()
