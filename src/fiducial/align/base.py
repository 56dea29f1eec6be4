"""What objectives share: imitation, what preferences compare, which completion is the better one, and what is logged beside the loss."""

from __future__ import annotations

from abc import abstractmethod
from math import log
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fiducial.core.errors import DataError
from fiducial.core.records import Group
from fiducial.core.roles import Objective
from fiducial.training.objective import GroupLogProbs, Step, keep

LabelSource = Literal["targets", "rewards"]
"""The field of a group that says how good its completions are."""
Mean = Literal["sequence", "token"]
"""What counts alike in a mean log-probability: each completion, or each token of a step."""


class LikelihoodObjective(Objective):
    """Negative log-likelihood of completions, each weighted by its target."""

    per_token: ClassVar[bool] = True

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, summed over tokens, [G]; the loop divides by the step's tokens."""
        return -(policy.targets * policy.logp).sum(1)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Mean log-probability per token of the completions, as they are weighted."""
        tokens = (policy.targets * policy.length).sum()
        return {"logp_per_token": float((policy.targets * policy.logp).sum() / tokens.clamp(min=1))}


class PairObjective(Objective):
    """A loss over two completions, given by what it is when the one or the other is the better.

    With a soft label p = probability that the first is better, it is p * loss(first, second) + (1 - p) * loss(second, first).
    """

    least: ClassVar[int] = 2
    most: ClassVar[int | None] = 2
    needs_reference: ClassVar[bool] = True

    beta: float

    @abstractmethod
    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Loss per pair, [G], from the scores of its completions, [G] each."""

    def score(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """What is compared, [G, K]: beta times the log-ratio, unless a method says otherwise."""
        return self.beta * log_ratio(policy, reference, objective=self.name)

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G]. Raises DataError unless every group holds two completions."""
        return self.contrast(policy, reference)

    def contrast(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """The mean of `loss` under the label, [G]; 0 for groups of one completion, where the method takes them."""
        counts = policy.mask.sum(1)
        if policy.logp.shape[1] > 2 or bool((counts < self.least).any()):
            hint = "make pairs first, or use align/exo or align/plackett_luce, which take any number from two"
            raise DataError(f"{self.name} compares two completions per prompt, but groups here have {sorted(set(counts.tolist()))}", hint=hint)
        if policy.logp.shape[1] == 1:
            return policy.logp[:, 0] * 0
        (first, second), p = self.score(policy, reference).unbind(1), policy.targets[:, 0]
        return (p * self.loss(first, second) + (1 - p) * self.loss(second, first)).where(policy.mask[:, 1], 0)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """See `preference_metrics`; the better completion is the one with the larger target."""
        return preference_metrics(self.score(policy, reference), policy, reference if self.needs_reference else None, better=policy.targets)


class Labels(NamedTuple):
    """How good the completions of each group are said to be."""

    value: Tensor
    """Target or reward, [G, K]; 0 where unknown."""
    known: Tensor
    """Whether the completion takes part, [G, K], bool: there is one, and it was scored."""


def labelled(policy: GroupLogProbs, source: LabelSource, *, objective: str) -> Labels:
    """Targets or rewards of the groups. Raises DataError when a group has no reward at all: it would silently teach nothing."""
    value = policy.rewards if source == "rewards" else policy.targets
    known = policy.mask & ~value.isnan()
    if not bool(known.any(1).all()):
        empty = int((~known.any(1)).sum())
        raise DataError(f"{objective} reads rewards, but {empty} of {len(known)} groups here have none", hint="score or drop them, or read the targets")
    return Labels(value.masked_fill(~known, 0), known)


def scored(group: Group) -> Group:
    """The group without completions whose reward is unknown."""
    return keep(group, [k for k, reward in enumerate(group.rewards or ()) if reward is not None])


def log_ratio(policy: GroupLogProbs, reference: GroupLogProbs | None, *, objective: str) -> Tensor:
    """Log-probability under the policy less that under the reference, [G, K], in nats."""
    if reference is None:
        raise ValueError(f"{objective} needs reference log-probabilities")
    return policy.logp - reference.logp


def per_token(values: Tensor, policy: GroupLogProbs) -> Tensor:
    """Sums over completions, [G, K], divided by the completions' tokens."""
    return values / policy.length.clamp(min=1)


def likelihood(policy: GroupLogProbs, mean: Mean = "sequence") -> Tensor:
    """Mean log-probability per token of the preferred completion (their mean under a soft label), [G], in nats.

    With the mean "token" their sum instead, divided by the preferred tokens per group of the whole step: the loop divides by groups, so
    that each token of a step counts alike.
    """
    if mean == "sequence":
        return (policy.targets * per_token(policy.logp, policy)).sum(1)
    return (policy.targets * policy.logp).sum(1) / (policy.step or Step.of(policy)).preferred_tokens


def preference_metrics(score: Tensor, policy: GroupLogProbs, reference: GroupLogProbs | None, *, better: Tensor) -> dict[str, float]:
    """What is logged of preferences. `better`, [G, K], orders the completions of a group; ties and NaN order nothing.

    accuracy:                    share of ordered pairs whose better completion has the higher score
    margin:                      mean difference of score in them
    chosen_logp, rejected_logp:  mean nats per token of the best completions of groups, and of all that something beats
    chosen_ratio, rejected_ratio: the same of the log-ratio to the reference, in nats per completion
    displaced:                   share of best completions that have lost probability against the reference
    The last three need a reference. Nothing is logged of groups that order nothing.
    """
    known = policy.mask & ~better.isnan()
    ordered = (better.unsqueeze(2) > better.unsqueeze(1)) & known.unsqueeze(2) & known.unsqueeze(1)  # [G, K, K]: row beats column
    if not bool(ordered.any()):
        return {}
    margin = (score.unsqueeze(2) - score.unsqueeze(1))[ordered]
    rejected = ordered.any(1)
    chosen = ordered.any(2) & ~rejected
    tokens = per_token(policy.logp, policy)
    found = {"accuracy": (margin > 0).float(), "margin": margin, "chosen_logp": tokens[chosen], "rejected_logp": tokens[rejected]}
    if reference is not None:
        ratio = policy.logp - reference.logp
        found |= {"chosen_ratio": ratio[chosen], "rejected_ratio": ratio[rejected], "displaced": (ratio[chosen] < 0).float()}
    return {name: float(values.mean()) for name, values in found.items()}


def masked_log_softmax(score: Tensor, known: Tensor) -> Tensor:
    """Log-softmax over the known places of each row, [G, K]; 0 at the others. Every row needs one known place."""
    return torch.log_softmax(score.masked_fill(~known, -torch.inf), 1).masked_fill(~known, 0)


def reward_weights(reward: Tensor, beta: float) -> Tensor:
    """min(exp(reward / beta), 1000), and 0 where the reward is unknown."""
    return (reward / beta).clamp(max=log(1000)).exp().nan_to_num(0.0)
