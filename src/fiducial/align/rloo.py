"""REINFORCE leave-one-out.

What it does: draws several answers per prompt from the policy, and raises each by its reward less the mean reward of its siblings; the KL
              to where the policy began is part of the reward.
Use it when:  there is a reward, and the plainest unbiased estimate is wanted: whole answers, no value model, no division by spreads.
Formula:      R'_k = R_k - beta sum_t log(pi_old / ref); A_k = R'_k - mean of the other R'; r = pi / pi_old of the whole answer;
              loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), averaged over answers.
Defaults:     beta 0.05, learning rate 1e-6 (ours, both as in common implementations; the paper scans beta), clip 0.2 on both sides, which
              only matters with several updates per batch. Four answers per prompt.
Limits:       needs two answers per prompt; rewards of widely different scales among prompts let a few prompts decide.
Source:       Ahmadian et al. 2024, arXiv:2402.14740, eq. 9; Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fiducial.training.advantages import leave_one_out
from fiducial.training.objective import GroupLogProbs
from fiducial.training.policy_gradient import Lessons, SampledObjective, clip_share, clipped, known, moved


@final
@dataclass(frozen=True, slots=True)
class RLOO(SampledObjective):
    """Policy gradient of whole answers with their siblings as the baseline."""

    on_policy: ClassVar[bool] = True
    least: ClassVar[int] = 2
    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.05
    """Weight of the KL in the reward, per nat; >= 0."""
    clip_low: float = 0.2
    """How far the probability ratio of an answer may fall below 1 and still be rewarded, in (0, 1)."""
    clip_high: float = 0.2
    """How far it may rise above 1; > 0."""

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and 0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(f"beta must be >= 0, clip_low in (0, 1) and clip_high > 0, got {self.beta}, {self.clip_low} and {self.clip_high}")

    def lessons(self, old: GroupLogProbs, reference: GroupLogProbs, *, room: int) -> Lessons:
        """Advantages of the answers, the same for all tokens of one."""
        found = leave_one_out(old.rewards - self.beta * (old.logp - reference.logp))
        # whether a group teaches is asked of the rewards: the KL alone nearly always differs
        return Lessons({"advantage": old.spread(found.values), "share": old.spread(old.mask.float())}, leave_one_out(old.rewards).flat)

    def surrogate(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Loss per group, [G]."""
        # an advantage of 0, as of demonstrations and of places without an answer, gives a loss of 0
        return clipped(*self._answers(policy), self.clip_low, self.clip_high).sum(1)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Share of answers whose gradient the clip stops."""
        log_ratio, advantage = self._answers(policy)
        return {"clipped": clip_share(log_ratio[policy.mask], advantage[policy.mask], self.clip_low, self.clip_high)}

    def _answers(self, policy: GroupLogProbs) -> tuple[Tensor, Tensor]:
        """Log-ratio and advantage of whole answers, [G, K] each."""
        tokens, (advantage,) = known(policy, "advantage", objective=self.name)
        return policy.summed(moved(tokens)), policy.summed(advantage) / policy.length.clamp(min=1)
