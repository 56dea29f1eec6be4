"""Reward under a limit on cost: the multiplier that weighs the two.

A cost is a reward whose higher values are worse. Source: Dai et al. 2023, arXiv:2310.12773 (safe RLHF).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WINDOW = 128
"""Answers over which the mean cost is taken."""
LEAST = 0.01
"""Weight below which the multiplier does not fall."""


@dataclass(frozen=True, slots=True)
class Multiplier:
    """The weight of the cost: rises while the mean cost is above its limit, falls while it is below.

    `log w <- log w + rate w (mean cost - limit)`, at most `most`; the mean is over the last 128 answers. It falls no lower than 0.01, or not at all
    where it is less: a smaller one hardly moves any more, and would not come back when the cost rises.
    """

    limit: float = -0.5
    """Mean cost that is allowed."""
    weight: float = 10.0
    """The multiplier now; > 0."""
    most: float = 20.0
    """Largest weight."""
    rate: float = 0.1
    """Step size of the logarithm."""
    delay: int = 1
    """Steps at the beginning in which the weight stays."""
    recent: tuple[float, ...] = ()
    """Costs of the last answers."""

    def __post_init__(self) -> None:
        if not (0 < self.weight <= self.most and self.rate > 0 and self.delay >= 0):
            raise ValueError(
                f"weight must be in (0, most], rate > 0 and delay >= 0, got weight {self.weight}, most {self.most}, rate {self.rate}, delay {self.delay}"
            )

    @property
    def mean(self) -> float:
        """Mean of the recent costs; NaN before the first."""
        return math.fsum(self.recent) / len(self.recent) if self.recent else math.nan

    def after(self, costs: Sequence[float], step: int) -> Multiplier:
        """The multiplier after the answers of a step, counted from 0."""
        seen = replace(self, recent=(*self.recent, *costs)[-WINDOW:])
        if step < self.delay or not seen.recent:
            return seen
        moved = math.log(self.weight) + self.rate * self.weight * (seen.mean - self.limit)
        highest, lowest = math.log(self.most), math.log(min(self.weight, LEAST))
        return replace(seen, weight=min(math.exp(max(lowest, min(moved, highest))), self.most))


def balanced(reward: float | None, cost: float | None, weight: float) -> float | None:
    """(reward - weight cost) / (1 + weight); None where either is unknown.

    Advantages that are linear in the reward become (A_reward - weight A_cost) / (1 + weight). A critic would value each balance anew:
    align/ppo has one for the reward and one for the cost, and balances their advantages.
    """
    return None if reward is None or cost is None else (reward - weight * cost) / (1 + weight)
