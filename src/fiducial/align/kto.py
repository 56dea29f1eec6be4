"""Kahneman-Tversky optimisation (KTO).

What it does: fits a policy to single answers that are each called desirable or not: no pairs are needed.
Use it when:  feedback is a thumb up or down. Pairs are used better by align/dpo.
Formula:      with D = log pi(y) - log pi_ref(y): w_d (1 - sigmoid(beta (D - k))) for desirable, w_u (1 - sigmoid(beta (k - D))) for others, mean
              over completions. k = max(0, mean D of mismatched pairs: each prompt of the step with the answer to the one before it), no gradient.
              A single answer is desirable if its reward is above 0. Of several answers to one prompt the preferred one is desirable and the
              others are not, whatever their rewards; those that share the first place are left out.
Defaults:     beta 0.1, weights 1, learning rate 1e-6 (paper: 5e-7 to 5e-6; batches of 8 or more). With unequal counts let
              desirable_weight * n_desirable / (undesirable_weight * n_undesirable) lie in 1 to 4/3 (paper, section 4.2).
Limits:       k is estimated from one step, so small batches are noisy; mismatched pairs cost one more forward pass.
Source:       Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8; apo_zero: D'Oosterlinck et al. 2024, arXiv:2408.06266, unpaired, k = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from fiducial.align.base import log_ratio, scored
from fiducial.core.records import Group
from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs, keep, sides


@final
@dataclass(frozen=True, slots=True)
class KTO(Objective):
    """Distance of single answers from a reference point, on the side where they should be."""

    needs_reference: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Strength of the pull towards the reference; > 0."""
    desirable_weight: float = 1.0
    """Weight of desirable answers; >= 0."""
    undesirable_weight: float = 1.0
    """Weight of the others; >= 0."""
    kind: Literal["kto", "apo_zero"] = "kto"
    """The reference point: kto estimates it, apo_zero takes 0, for answers better than the model's own."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.desirable_weight >= 0 and self.undesirable_weight >= 0):
            given = f"{self.beta}, {self.desirable_weight} and {self.undesirable_weight}"
            raise ValueError(f"beta must be > 0 and the weights >= 0, got {given}")
        if self.kind not in ("kto", "apo_zero"):
            raise ValueError(f"kind must be kto or apo_zero, got {self.kind}")

    @property
    def reads(self) -> tuple[Reading, ...]:
        """Mismatched pairs where they are needed."""
        return ("mismatched",) if self.kind == "kto" else ()

    def prepare(self, group: Group) -> Group:
        """The answers of which it is known whether they are desirable; of several to one prompt, with rewards of 1 and -1 that say so."""
        known = scored(group) if group.rewards is not None and (group.targets is None or len(group.completions) == 1) else group
        if len(group.completions) == 1 or not known.completions:
            return known
        said = sides(known)
        return keep(known.model_copy(update={"rewards": tuple(said)}), [k for k, side in enumerate(said) if side is not None])

    def size(self, groups: GroupLogProbs) -> Tensor:
        """Completions, [G]."""
        return groups.mask.sum(1).float()

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, summed over completions, [G]; the loop divides by the step's completions."""
        ahead = self.beta * (log_ratio(policy, reference, objective=self.name) - self._point(policy, reference))
        desirable = self.desirable_weight * torch.sigmoid(-ahead)
        undesirable = self.undesirable_weight * torch.sigmoid(ahead)
        return torch.where(_desirable(policy), desirable, undesirable).where(policy.mask, 0).sum(1)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """The reference point, and mean log-ratios of desirable and undesirable answers, in nats."""
        ratio, good = log_ratio(policy, reference, objective=self.name), _desirable(policy)
        sides = {"chosen_ratio": ratio[good & policy.mask], "rejected_ratio": ratio[~good & policy.mask]}
        return {"reference_point": float(self._point(policy, reference))} | {name: float(r.mean()) for name, r in sides.items() if len(r)}

    def _point(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        if self.kind == "apo_zero":
            return policy.weight.new_zeros(())
        if reference is None or policy.mismatched is None or reference.mismatched is None:
            raise ValueError(f"{self.name} needs mismatched pairs under policy and reference")
        apart = (policy.mismatched - reference.mismatched).detach()
        return apart.mean().clamp(min=0) if len(apart) else apart.sum()


def _desirable(groups: GroupLogProbs) -> Tensor:
    return torch.where(groups.rewards.isnan(), groups.targets > 0.5, groups.rewards > 0)
