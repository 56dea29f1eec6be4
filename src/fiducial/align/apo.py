"""Anchored preference optimisation.

What it does: fits preference pairs while saying what should become of each response by itself, not only of their difference.
Use it when:  it is known how good the pairs are beside the model. zero: the preferred responses are better than what the model gives, so they
              rise and the others fall. down: they are worse, so both fall, the rejected ones further.
Formula:      with dw = w - w_ref and dl = l - l_ref as in align/dpo:
              zero: loss = 1 - sigmoid(beta dw) + sigmoid(beta dl);  down: loss = sigmoid(beta dw) + 1 - sigmoid(beta (dw - dl)).
Defaults:     variant zero, beta 0.1, learning rate 1e-6; SmolLM3 was trained with zero and beta 0.05.
Limits:       the loss is bounded: a response that has moved far, or was pushed to the wrong side, has hardly a gradient left.
Source:       D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from fiducial.align.base import PairObjective


@final
@dataclass(frozen=True, slots=True)
class APO(PairObjective):
    """Sigmoids of the two log-ratios."""

    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Scale of the log-ratios; > 0. Smaller moves further."""
    variant: Literal["zero", "down"] = "zero"
    """Whether preferred responses should rise (zero) or fall less than the others (down)."""

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.variant not in ("zero", "down"):
            raise ValueError(f"beta must be > 0 and variant zero or down, got {self.beta} and {self.variant}")

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Loss in [0, 2], [G]."""
        if self.variant == "zero":
            return (-better).sigmoid() + worse.sigmoid()
        return better.sigmoid() + (worse - better).sigmoid()
