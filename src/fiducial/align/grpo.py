"""Group relative policy optimisation.

What it does: draws several answers per prompt from the policy, and raises those that were rewarded above the mean of their group, within
              a clip; a KL term holds the policy to where it began.
Use it when:  there is a reward but no value model, and answers of one prompt differ in reward. Where rewards are rarely equal and the loss
              should be unbiased, align/rloo; where single tokens are to be told apart, align/ppo.
Formula:      A_k = (R_k - mean) / (std + 1e-4) over the group; r = pi / pi_old of a token; loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
              + beta r k3, k3 = ref / pi - 1 - log(ref / pi); averaged over each answer's tokens, then over answers.
Defaults:     beta 0.04, clip 0.2 on both sides, learning rate 1e-6 (paper); clip_high 0.28 is DAPO's. The other means are those of DAPO (token)
              and of "Dr. GRPO" (constant, with scale none). Scale batch is the baseline form of REINFORCE++: R_k - mean of the group, brought
              to mean 0 and deviation 1 over all answers of the step. That paper has k2 in the place of k3, and its code takes mean and
              deviation over tokens, where longer answers count for more.
Limits:       a group of equal rewards teaches nothing (`flat_share` in the figures). Division by the group's deviation gives easy and
              hard prompts the same say; `sequence` makes long wrong answers cheap.
Source:       Shao et al. 2024, arXiv:2402.03300, eq. 3; arXiv:2503.14476 (DAPO), arXiv:2503.20783 (Dr. GRPO), arXiv:2501.03262 (REINFORCE++).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from fiducial.training.advantages import batch_whitened, group_normalised
from fiducial.training.kl import k3
from fiducial.training.objective import GroupLogProbs
from fiducial.training.policy_gradient import FARTHEST, Lessons, Mean, SampledObjective, clip_share, clipped, counts, known, moved, shares


@final
@dataclass(frozen=True, slots=True)
class GRPO(SampledObjective):
    """Clipped policy gradient with the group as its own baseline."""

    on_policy: ClassVar[bool] = True
    least: ClassVar[int] = 2
    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.04
    """Weight of the KL term; >= 0. Without it the policy drifts to whatever the reward overlooks."""
    clip_low: float = 0.2
    """How far the probability ratio may fall below 1 and still be rewarded, in (0, 1)."""
    clip_high: float = 0.2
    """How far it may rise above 1; > 0."""
    mean: Mean = "sequence"
    """What the loss is averaged over: the tokens of each answer, all tokens of the step, or answers of one constant length."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation in the group, in the whole batch, or nothing."""

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and 0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(f"beta must be >= 0, clip_low in (0, 1) and clip_high > 0, got {self.beta}, {self.clip_low} and {self.clip_high}")
        if self.mean not in ("sequence", "token", "constant") or self.scale not in ("group", "batch", "none"):
            raise ValueError(f"mean must be sequence, token or constant, scale group, batch or none, got {self.mean} and {self.scale}")

    def lessons(self, old: GroupLogProbs, reference: GroupLogProbs, *, room: int) -> Lessons:
        """Advantages of the answers, the same for all tokens of one."""
        found = batch_whitened(old.rewards) if self.scale == "batch" else group_normalised(old.rewards, divide=self.scale == "group")
        return Lessons({"advantage": old.spread(found.values), "share": shares(old, self.mean, room=room)}, found.flat)

    def counted(self, groups: GroupLogProbs) -> Tensor:
        """Answers of each group, or its tokens for the mean over tokens, [G]."""
        return counts(groups, self.mean)

    def surrogate(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Loss per group, [G]."""
        tokens, (advantage, share) = known(policy, "advantage", "share", objective=self.name)
        log_ratio = moved(tokens)
        loss = clipped(log_ratio, advantage, self.clip_low, self.clip_high)
        if self.beta:
            if reference is None or reference.tokens is None:
                raise ValueError(f"{self.name} needs reference log-probabilities of each token")
            loss = loss + self.beta * log_ratio.clamp(-FARTHEST, FARTHEST).exp() * k3(tokens.logp - reference.tokens.logp)
        return policy.summed(share * loss).sum(1)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Share of tokens whose gradient the clip stops."""
        tokens, (advantage,) = known(policy, "advantage", objective=self.name)
        return {"clipped": clip_share(moved(tokens), advantage, self.clip_low, self.clip_high)}
