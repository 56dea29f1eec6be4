"""Bradley-Terry reward model.

What it does: trains a linear head on the model's last hidden state to score answers, so that the better one of a prompt has the higher
              score. All completions of a prompt are scored in one pass, and every pair of them counts.
Use it when:  a reward is needed that no rule can say: for align/ppo, align/grpo, align/rloo, best-of-N, or filtering. Read the result with
              align/learned_reward.
Formula:      d = r_i - r_j, p = probability that i is the better one, m = margin * |difference of rewards|; loss = mean over the pairs of a
              prompt of -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m) + centering * (r_i + r_j)^2.
Defaults:     labels are targets, p = t_i / (t_i + t_j), and the order of rewards for two that can neither be the best; centering 0.01 (Eisenstein
              et al. 2023), no margin; learning rate 1e-5; the head begins at a tenth of the paper's spread, so that small data need not unlearn
              large random scores.
Limits:       look at `accuracy_when_shorter` and `length_correlation` (evaluate/reward_card) before you trust it: length is the usual shortcut.
              Several members that differ in the seed, and their minimum, resist a policy that exploits one (Coste et al. 2023).
Source:       Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288; centering: Eisenstein et al. 2023,
              arXiv:2312.09244; head (spread 1): Huang et al. 2024, arXiv:2403.17031; ensembles: Coste et al. 2023, arXiv:2310.02743.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch.nn.functional as F
from torch import Tensor

from fiducial.core.config import refuse_idle
from fiducial.core.records import Group
from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs
from fiducial.training.scorecard import comparisons, difference, figures, pair_mean


@final
@dataclass(frozen=True, slots=True)
class RewardModel(Objective):
    """Logistic loss on differences of scores."""

    reads: ClassVar[tuple[Reading, ...]] = ("scores",)
    least: ClassVar[int] = 2
    higher_is: ClassVar[Literal["better", "worse"]] = "better"

    labels: Literal["targets", "rewards"] = "targets"
    """What says which completion is better: targets, which may be soft, or rewards, of which only the order counts."""
    margin: float = 0.0
    """Score by which a pair must differ, per unit of difference in its rewards; >= 0."""
    centering: float = 0.01
    """Weight of the squared sum of a pair's scores, which keeps their mean near 0; >= 0."""

    def __post_init__(self) -> None:
        if self.labels not in ("targets", "rewards") or not (self.margin >= 0 and self.centering >= 0):
            raise ValueError(f"labels must be targets or rewards, margin and centering >= 0, got {self.labels}, {self.margin} and {self.centering}")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, mean over its pairs, [G]."""
        scores = policy.given_scores
        pairs = comparisons(policy, self.labels)
        d, m, p = difference(scores), self.margin * pairs.gap, pairs.preference
        loss = -p * F.logsigmoid(d - m) - (1 - p) * F.logsigmoid(-d - m)
        return pair_mean(loss + self.centering * (scores.unsqueeze(2) + scores.unsqueeze(1)).square(), pairs.known)

    def prepare(self, group: Group) -> Group:
        """The group. Raises ConfigError for a margin where there are no rewards to take it from."""
        if group.rewards is None:
            refuse_idle(self, ["margin"], when="on a group without rewards, by whose differences it counts", hint="give rewards with every group, or no margin")
        return group

    def size(self, groups: GroupLogProbs) -> Tensor:
        """Groups in which some pair is ordered, [G]."""
        return comparisons(groups, self.labels).known.any((1, 2)).float()

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """See `fiducial.training.scorecard.figures`."""
        return figures(policy.given_scores, policy, self.labels)
