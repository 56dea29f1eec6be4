"""Efficient exact optimisation (EXO).

What it does: moves the policy's distribution over a prompt's completions to a target distribution by the reverse KL, as reinforcement
              learning would, without sampling. The target comes from preferences (EXO-pref) or from rewards (EXO-rw).
Use it when:  there are two or more completions per prompt, sampled near the policy; with rewards, when their amounts mean something and there
              are three or more, or they are not normalized. For rankings alone use align/plackett_luce.
Formula:      q = softmax_k(beta * (log pi(y_k) - log pi_ref(y_k))), summed over tokens; loss = sum_k q_k (log q_k - log p_k). Targets: p_k = t_k (1 - e)
              + (1 - t_k) e / (K - 1), e = label_smoothing. Rewards: p = softmax_k(r_k / beta_reward). Forward: loss = -sum_k p_k log q_k.
Defaults:     beta 0.1, label_smoothing 1e-3, learning rate 1e-6 (paper); beta_reward 0.5 on rewards normalized per prompt (ours: one value for
              rewards of any scale). The paper has 0.5 for both temperatures on dialogue, on raw rewards.
Limits:       the first step is about 3.5 times that of align/dpo at the same rate. Pairs ranked far wrongly have no gradient: shuffle, one epoch.
              Completions without a reward take no part. Of two completions normalized rewards are 1 and -1 whatever their amounts: only the order counts.
Source:       Ji et al. 2024, arXiv:2402.00856, eq. 16 for preferences; forward on rewards is its DPO-rw, on two hard targets without smoothing DPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from fiducial.align.base import Labels, labelled, log_ratio, masked_log_softmax, preference_metrics, scored
from fiducial.core.config import refuse_idle
from fiducial.core.records import Group
from fiducial.core.roles import Objective
from fiducial.training.objective import GroupLogProbs


@final
@dataclass(frozen=True, slots=True)
class EXO(Objective):
    """KL divergence between the policy's and the target distribution over a prompt's completions."""

    least: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Temperature of the policy's side; > 0. With raw rewards, beta times beta_reward is the KL coefficient of the optimum."""
    labels: Literal["targets", "rewards"] = "targets"
    """What the target distribution is made of: targets (EXO-pref) or rewards (EXO-rw)."""
    label_smoothing: float = 1e-3
    """Of targets: share of labels believed to be wrong, in (0, 0.5); 0 would make the reverse KL infinite."""
    beta_reward: float = 0.5
    """Of rewards: temperature of the target's side; > 0."""
    normalized: bool = True
    """Of rewards: whether they are brought to mean 0 and standard deviation 1 within each prompt."""
    divergence: Literal["reverse", "forward"] = "reverse"
    """Direction of the KL divergence: reverse seeks modes (EXO), forward covers (DPO-pref, DPO-rw)."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.beta_reward > 0):
            raise ValueError(f"beta and beta_reward must be > 0, got {self.beta} and {self.beta_reward}")
        if self.labels not in ("targets", "rewards") or self.divergence not in ("reverse", "forward"):
            raise ValueError(f"labels must be targets or rewards, divergence reverse or forward, got {self.labels} and {self.divergence}")
        if not (0 <= self.label_smoothing < 0.5) or (self.label_smoothing == 0 and self.divergence == "reverse"):
            raise ValueError(f"label_smoothing must be in (0, 0.5), got {self.label_smoothing}: at 0 the loss is infinite")
        # an option that would do nothing was meant for the other kind of label
        idle = ("beta_reward", "normalized") if self.labels == "targets" else ("label_smoothing",)
        refuse_idle(self, idle, when=f"when labels is {self.labels}", hint="leave it out, or give the other labels")

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G], in nats."""
        found = labelled(policy, self.labels, objective=self.name)
        log_p = self._target(found)
        log_q = masked_log_softmax(self.beta * log_ratio(policy, reference, objective=self.name), found.known)
        return (log_q.exp() * (log_q - log_p)).sum(1) if self.divergence == "reverse" else -(log_p.exp() * log_q).sum(1)

    def prepare(self, group: Group) -> Group:
        """The group without completions that have no label."""
        return scored(group) if self.labels == "rewards" else group

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """See `align.base.preference_metrics`."""
        score = self.beta * log_ratio(policy, reference, objective=self.name)
        return preference_metrics(score, policy, reference, better=policy.rewards if self.labels == "rewards" else policy.targets)

    def _target(self, found: Labels) -> Tensor:
        """Log-probability of each completion in the target distribution, [G, K]; 0 for those that take no part."""
        value, known = found
        if self.labels == "rewards":
            return masked_log_softmax((_normalized(found) if self.normalized else value) / self.beta_reward, known)
        share = self.label_smoothing / (known.sum(1, keepdim=True) - 1).clamp(min=1)
        return (value * (1 - self.label_smoothing) + (1 - value) * share).where(known, 1).log()


def _normalized(found: Labels) -> Tensor:
    """Rewards of each group with mean 0 and standard deviation 1 over those that are known, [G, K]; 0 where all are equal."""
    value, known = found
    count = known.sum(1, keepdim=True)
    centred = (value - value.sum(1, keepdim=True) / count).masked_fill(~known, 0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    # compared exactly: the mean of equal numbers is off by a rounding error, which would be blown up to 1
    equal = value.where(known, -float("inf")).amax(1, keepdim=True) == value.where(known, float("inf")).amin(1, keepdim=True)
    return (centred / deviation.where(~equal, 1)).masked_fill(equal, 0)
