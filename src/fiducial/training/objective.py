"""What an objective sees: log-probabilities of groups of completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fiducial.core.records import Group


@dataclass(frozen=True, slots=True, eq=False)
class GroupLogProbs:
    """Log-probabilities of G groups of up to K completions, in nats, float32. Places beyond a group's completions are masked."""

    logp: Tensor
    """Sum over the completion's tokens, [G, K]; 0 where masked."""
    length: Tensor
    """Number of those tokens, [G, K]; 0 where masked."""
    mask: Tensor
    """Whether there is a completion, [G, K], bool."""
    targets: Tensor
    """Probability that each completion is the best, [G, K]; rows sum to 1. All on the first completion where the group does not say."""
    rewards: Tensor
    """Reward per completion, [G, K]; NaN where unknown."""
    weight: Tensor
    """How much each group counts, [G]."""

    def with_logp(self, logp: Tensor) -> GroupLogProbs:
        """The same groups under another model."""
        return GroupLogProbs(logp, self.length, self.mask, self.targets, self.rewards, self.weight)

    def select(self, rows: Sequence[int]) -> GroupLogProbs:
        """Some of the groups, in the given order."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.logp.device)
        return GroupLogProbs(*(getattr(self, f.name)[index] for f in fields(self)))


def layout(groups: Sequence[Group], lengths: Sequence[Sequence[int]]) -> GroupLogProbs:
    """The parts of `GroupLogProbs` that do not depend on a model; `lengths` holds scored tokens per completion per group."""
    width = max((len(g.completions) for g in groups), default=1)
    shape = (len(groups), width)
    length, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    targets, rewards = torch.zeros(shape), torch.full(shape, float("nan"))
    for row, (group, sizes) in enumerate(zip(groups, lengths, strict=True)):
        k = len(group.completions)
        length[row, :k] = torch.tensor(sizes)
        mask[row, :k] = True
        targets[row, :k] = torch.tensor(group.targets if group.targets is not None else [1.0] + [0.0] * (k - 1))
        if group.rewards is not None:
            rewards[row, :k] = torch.tensor([float("nan") if r is None else r for r in group.rewards])
    return GroupLogProbs(torch.zeros(shape), length, mask, targets, rewards, torch.tensor([g.weight for g in groups]))
