"""What preference objectives share: which completion is preferred, and how far the policy has moved from the reference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fiducial.core.errors import DataError
from fiducial.training.objective import GroupLogProbs


class Pairs(NamedTuple):
    """Two completions per group, as columns of [G] tensors. Column 0 is the first completion, as the data has it."""

    first: Tensor
    """Log-ratio of policy to reference (or log-probability, without a reference) of the first completion, [G]."""
    second: Tensor
    preference: Tensor
    """Probability that the first is the better one, [G]."""


def pairs(policy: GroupLogProbs, reference: GroupLogProbs | None, *, objective: str) -> Pairs:
    """The pair in each group. Raises DataError unless every group holds exactly two completions."""
    if policy.logp.shape[1] != 2 or not bool(policy.mask.all()):
        counts = sorted(set(policy.mask.sum(1).tolist()))
        raise DataError(f"{objective} compares two completions per prompt, but groups here have {counts}", hint="make pairs first, or use align/sft")
    ratio = policy.logp - reference.logp if reference is not None else policy.logp
    return Pairs(ratio[:, 0], ratio[:, 1], policy.targets[:, 0])
