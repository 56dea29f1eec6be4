"""Dynamic fine-tuning (DFT).

What it does: supervised fine-tuning in which each token counts by how likely the model already finds it.
Use it when:  align/sft spoils what the model could do before: rare tokens of the examples, which pull hardest there, hardly pull here.
Formula:      loss = -sum_t stop(p_t) log p_t, p_t = pi(y[t] | x, y[<t]), over the completion, summed over the step and divided by its number
              of tokens; stop() lets no gradient through. With soft targets, completions are weighted by them.
Defaults:     learning rate 2e-5, as align/sft.
Limits:       what the model finds impossible it does not learn: new facts and formats need align/sft.
Source:       Wu et al. 2025, arXiv:2508.05629, eq. 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fiducial.core.records import Group
from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs, examples


@final
@dataclass(frozen=True, slots=True)
class DFT(Objective):
    """Negative log-likelihood of the preferred completions, each token weighted by its probability."""

    reads: ClassVar[tuple[Reading, ...]] = ("tokens",)
    learning_rate: ClassVar[float] = 2e-5
    per_token: ClassVar[bool] = True

    def prepare(self, group: Group) -> Group:
        """Without completions that are no examples."""
        return examples(group)

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, summed over tokens, [G]; the loop divides by the step's tokens."""
        logp = policy.per_token
        return -(policy.targets * policy.summed(logp.detach().exp() * logp)).sum(1)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Mean log-probability and mean weight per token of the preferred completions."""
        tokens = (policy.targets * policy.length).sum().clamp(min=1)
        weight = policy.summed(policy.per_token.exp())
        return {"logp_per_token": float((policy.targets * policy.logp).sum() / tokens), "token_weight": float((policy.targets * weight).sum() / tokens)}
