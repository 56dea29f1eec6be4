"""Hinge loss on preference pairs (SLiC).

What it does: widens the margin of each pair until it reaches 1, then leaves the pair alone.
Use it when:  pairs that are already well apart should stop moving the model.
Formula:      loss = max(0, 1 - z), z as in align/dpo.
Defaults:     beta 0.1, so that a pair counts until its log-ratios are 10 nats apart; learning rate 1e-6 as for align/dpo.
Limits:       a soft label p pulls to z = 1 or -1, whichever side of 0.5 it is on, not to a margin that expresses p.
Source:       Zhao et al. 2023, arXiv:2305.10425; with log-ratios to a reference: Liu et al. 2023, arXiv:2309.06657.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fiducial.align.base import PairObjective


@final
@dataclass(frozen=True, slots=True)
class Hinge(PairObjective):
    """Hinge on the difference of log-ratios."""

    learning_rate: ClassVar[float] = 1e-6

    beta: float = 0.1
    """Inverse of the margin asked for, in nats; > 0."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """What the margin lacks of 1, [G]."""
        return (1 - (better - worse)).relu()
