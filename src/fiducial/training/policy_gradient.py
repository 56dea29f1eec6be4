"""What objectives share that learn from the policy's own samples: the clipped surrogate, and what each token is taught.

For every batch of samples the outer loop (`fiducial.training.online`) scores them under the policy that drew them and under the
reference, and asks the objective for the lessons: constants per token. One or more updates on the same samples follow, in which the
probability ratio to the policy that drew them is kept near 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fiducial.core.roles import Objective, Reading
from fiducial.training.objective import GroupLogProbs, Tokens

FARTHEST = 20.0
"""Largest |log ratio| that is exponentiated."""

Mean = Literal["sequence", "token", "constant"]
"""What a loss per token is averaged over: the tokens of each answer and then the answers; all tokens of the step; answers of one assumed length."""


class Lessons(NamedTuple):
    """What a batch of samples teaches."""

    given: Mapping[str, Tensor]
    """By name, [E] each: `advantage` is what the token is pushed by, `share` what its loss is multiplied with, 0 in demonstrations that are
    mixed in; further ones as the objective needs them. The outer loop adds `old`, the log-probability when sampled, from the second
    update on the same samples: in the first the policy is the one that sampled, to the last bit."""
    flat: Tensor
    """Groups whose answers all have one reward, [G], bool."""


class SampledObjective(Objective):
    """A loss on fresh samples of the policy."""

    reads: ClassVar[tuple[Reading, ...]] = ("tokens",)
    needs_reference: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True
    """Trained on prompts and rewards, not on data; read by the command line from the file of each method."""
    updates: ClassVar[int] = 1
    """Optimizer steps on one batch of samples, by default."""
    values_cost: ClassVar[bool] = False
    """Whether, under a limit on cost, its lessons weigh `old.costs` by `old.cost_weight` themselves, with values of a second head; for others
    the weighed cost is taken off the rewards."""

    beta: float

    @abstractmethod
    def lessons(self, old: GroupLogProbs, reference: GroupLogProbs, *, room: int) -> Lessons:
        """From samples with the log-probability of each token when it was drawn and under the reference; `old.rewards`, and
        `old.costs` where it `values_cost` and there is a limit, are known wherever there is an answer; answers had room for `room` tokens.
        """

    @abstractmethod
    def surrogate(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Loss of the samples per group, [G], before it is divided by the step's `counted`; 0 where no token has a share."""

    def counted(self, groups: GroupLogProbs) -> Tensor:
        """How much a group of samples counts in the mean, [G]: its answers, or its tokens."""
        return counts(groups, "sequence")

    def size(self, groups: GroupLogProbs) -> Tensor:
        """What each group counts in the number that losses are divided by, [G]; demonstrations that are mixed in count nothing there."""
        imitated = groups.tokens.given.get("imitate") if groups.tokens is not None else None
        count = self.counted(groups)
        return count if imitated is None else count.where(groups.summed(imitated).sum(1) == 0, 0.0)

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G]: the surrogate of samples, the weighed negative log-likelihood of demonstrations."""
        loss = self.surrogate(policy, reference)
        if policy.tokens is None or "imitate" not in policy.tokens.given:
            return loss
        return loss - policy.summed(policy.tokens.given["imitate"] * policy.tokens.logp).sum(1)


def known(policy: GroupLogProbs, *names: str, objective: str) -> tuple[Tokens, list[Tensor]]:
    """The tokens, and what was `given` of them under these names. Raises ValueError when the groups are not samples with lessons."""
    tokens = policy.tokens
    missing = [name for name in names if tokens is None or name not in tokens.given]
    if tokens is None or missing:
        raise ValueError(f"{objective} learns from its own samples: nothing is known of {', '.join(missing)} here")
    return tokens, [tokens.given[name] for name in names]


def moved(tokens: Tokens) -> Tensor:
    """Log-ratio of each token to the policy that drew it, [E]; where that policy is this one, 0 with the gradient of the log-probability.

    Scored apart, the two would differ by the rounding of bfloat16, which over a long answer is as large as the clip.
    """
    return tokens.logp - tokens.given.get("old", tokens.logp.detach())


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) for r = exp(log_ratio), of any shape: no reward for moving further than the clip."""
    ratio = log_ratio.clamp(-FARTHEST, FARTHEST).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clip_share(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> float:
    """Share of the places with an advantage at which the clip stops the gradient."""
    ratio, pushed = log_ratio.exp(), advantage != 0
    stopped = ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
    return float(stopped[pushed].float().mean()) if bool(pushed.any()) else 0.0


def shares(parts: GroupLogProbs, mean: Mean, *, room: int) -> Tensor:
    """What each token's loss is multiplied with, [E], so that their sum divided by the sum of `counts` is the mean."""
    if mean == "token":
        each = torch.ones(parts.length.shape)
    else:
        each = 1 / (parts.length.clamp(min=1) if mean == "sequence" else torch.full(parts.length.shape, room))
    return parts.spread(each)


def counts(parts: GroupLogProbs, mean: Mean) -> Tensor:
    """How much each group counts in the mean, [G]: by its tokens or by its answers."""
    return (parts.length if mean == "token" else parts.mask).sum(1).float()
