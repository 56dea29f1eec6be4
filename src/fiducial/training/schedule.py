"""How fast weights move over a run, and when a step was too large."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fiducial.training.options import TrainOptions

EXPLODED = 100.0
"""Times its median that the gradient's norm may reach."""


def rate(step: int, last: int, options: TrainOptions, peak: float) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then a cosine down to zero at `last`."""
    rising = max(1, round(options.warmup * last))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, last - rising)))


def exploded(norm: float, norms: Sequence[float]) -> str:
    """A reason to stop when the gradient's norm is over 100 times the median of at least ten before it; else empty.

    Steps without a gradient do not count: they say nothing of what is usual where there is one.
    """
    known = [n for n in norms if n > 0]
    usual = statistics.median(known) if len(known) >= 10 else math.inf
    return f"the gradient's norm {norm:.3g} is over 100 times its median {usual:.3g}" if norm > EXPLODED * usual else ""
