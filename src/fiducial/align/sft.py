"""Supervised fine-tuning.

What it does: raises the likelihood of the preferred completion of each group, token by token.
Use it when:  good answers exist, and the behaviour wanted is imitation of them. It says nothing about what to avoid: add contrast in the
              data (benign twins answered), or use align/dpo.
Formula:      loss = -sum_t log pi(y[t] | x, y[<t]) over the completion, summed over the step and divided by the step's number of tokens;
              with soft targets p_k, the sum is weighted by p_k.
Defaults:     learning rate 2e-5 for full fine-tuning, ten times that for LoRA (TRL 1.16 uses 2e-5 too).
Limits:       narrow refusal data teaches a blunt rule; look at the benign twins before you believe a lower loss. An answer that is labelled
              false is left out and counted; align/kto learns from it.
Source:       Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fiducial.align.base import LikelihoodObjective
from fiducial.core.records import Group
from fiducial.training.objective import examples


@final
@dataclass(frozen=True, slots=True)
class SFT(LikelihoodObjective):
    """Negative log-likelihood of the preferred completions."""

    learning_rate: ClassVar[float] = 2e-5

    def prepare(self, group: Group) -> Group:
        """Without completions that are no examples."""
        return examples(group)
