"""How far a policy is from its reference, estimated from its own samples, and how hard it is pulled back.

All take l = log pi(y) - log reference(y) in nats, for tokens or for whole answers drawn from pi. Averaged over fresh samples each
estimates KL(pi, reference). A clearly negative mean of k1 says that the samples are not from pi: another temperature, a cut tail, a
wrong mask.
Source: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

FARTHEST = 20.0
"""Largest |l| that is exponentiated."""


def k1(ratio: Tensor) -> Tensor:
    """l itself: unbiased, may be negative; subtracted from the reward it gives the right policy gradient."""
    return ratio


def k2(ratio: Tensor) -> Tensor:
    """l^2 / 2: biased, never negative; as a loss on fresh samples its gradient is that of the KL."""
    return ratio.square() / 2


def k3(ratio: Tensor) -> Tensor:
    """exp(-l) - 1 + l: unbiased, never negative, of low variance; as a loss its gradient is right to first order only."""
    return (-ratio).clamp(-FARTHEST, FARTHEST).exp() - 1 + ratio


@dataclass(frozen=True, slots=True)
class Pull:
    """The weight of the KL term. With a target it follows the measured KL; without one it stays.

    `beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)` after every n answers.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    beta: float
    """Weight of the KL term, > 0."""
    target: float | None = None
    """KL in nats per answer to settle at."""
    horizon: float = 10_000.0
    """Answers over which a lasting error of 20 % changes beta by a factor of about e^0.2."""

    def after(self, kl: float, answers: int) -> Pull:
        """The weight after a step of so many answers with this mean KL (k1 or k3, nats per answer)."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + error * answers / self.horizon))
