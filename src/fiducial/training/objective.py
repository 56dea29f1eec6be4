"""What an objective sees: log-probabilities, or scores of a linear head, for groups of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from fiducial.core.records import Group


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The E scored tokens of some groups, ordered by group, completion and position."""

    group: Tensor
    """Row of the group that each token belongs to, [E], int64, ascending."""
    completion: Tensor
    """Its completion within the group, [E], int64."""
    position: Tensor
    """Its place in the completion, [E], int64, from 0."""
    logp: Tensor
    """Log-probability given everything before it, in nats, [E]."""
    values: Tensor | None = None
    """The head at the state before each token, [E], when the objective reads `values`."""
    cost_values: Tensor | None = None
    """The same with the head of the cost, [E], under a limit on it."""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """What else is known of each token, [E] each, without gradient. In training data `value`, a number per token: that of its part of
    the completion, else the completion's reward, else 1 for the preferred completion and -1 for another; NaN where unknown. With the
    reading `prompt` also `answer`: 1 for a token of the completion, 0 for one of its prompt."""

    def select(self, rows: Sequence[int]) -> Tokens:
        """The tokens of some groups, in the given order; groups are numbered anew."""
        bounds = [torch.searchsorted(self.group, torch.tensor(list(rows)), right=right).tolist() for right in (False, True)]
        spans = [range(start, end) for start, end in zip(*bounds, strict=True)]
        index = torch.tensor([i for span in spans for i in span], dtype=torch.long)
        group = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([len(span) for span in spans], dtype=torch.long))
        values, costs = (v[index] if v is not None else None for v in (self.values, self.cost_values))
        given = {name: v[index] for name, v in self.given.items()}
        return Tokens(group, self.completion[index], self.position[index], self.logp[index], values, costs, given)


@dataclass(frozen=True, slots=True)
class Step:
    """What couples the losses of a step, known before any model is run."""

    preferred_tokens: float
    """Tokens of the preferred completions per group, groups counted by their weight; 1 where none counts."""

    @classmethod
    def of(cls, groups: GroupLogProbs) -> Step:
        """That of a step of these groups."""
        weight = float(groups.weight.sum())
        return cls(float((groups.weight * (groups.targets * groups.length).sum(1)).sum()) / weight if weight else 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class GroupLogProbs:
    """Log-probabilities of G groups of up to K completions, in nats, float32. Places beyond a group's completions are masked."""

    logp: Tensor
    """Sum over the completion's tokens, [G, K]; 0 where masked, and everywhere when only `scores` are read."""
    length: Tensor
    """Number of those tokens, [G, K]; 0 where masked."""
    mask: Tensor
    """Whether there is a completion, [G, K], bool."""
    targets: Tensor
    """Probability that each completion is the best, [G, K]; rows sum to 1. Where the group does not say, all on the completion
    with the highest reward, equals sharing it, else on the first."""
    rewards: Tensor
    """Reward per completion, [G, K]; NaN where unknown."""
    weight: Tensor
    """How much each group counts, [G]."""
    tokens: Tokens | None = None
    """The single tokens, when the objective reads them."""
    scores: Tensor | None = None
    """The head at the last token of each completion, [G, K]; 0 where masked. When the objective reads them."""
    mismatched: Tensor | None = None
    """Log-probabilities of completions of one group under the prompt of another, over the whole step, [M], without gradient."""
    costs: Tensor | None = None
    """What each completion costs, [G, K], under a limit on it, for an objective that values cost by itself; for others it was taken off the rewards."""
    cost_weight: float = 0.0
    """How much that counts beside a reward of weight 1."""
    step: Step | None = None
    """What is known of the whole step that these groups are a part of; None = they are all of it."""

    def with_logp(self, logp: Tensor) -> GroupLogProbs:
        """The same groups under another model."""
        return replace(self, logp=logp)

    def with_tokens(self, logp: Tensor, values: Tensor | None = None, cost_values: Tensor | None = None) -> GroupLogProbs:
        """The same groups with the log-probability of each token, [E], and what the heads say before it. Raises ValueError where groups
        were laid out without tokens.
        """
        if self.tokens is None:
            raise ValueError("these groups were laid out without their tokens")
        return replace(self, logp=self.summed(logp), tokens=replace(self.tokens, logp=logp, values=values, cost_values=cost_values))

    @property
    def per_token(self) -> Tensor:
        """Log-probability of each token, [E]. Raises ValueError when they were not read."""
        if self.tokens is None:
            raise ValueError("the objective reads single tokens, which it was not given")
        return self.tokens.logp

    @property
    def values(self) -> Tensor:
        """The head's value before each token, [E]. Raises ValueError when they were not read."""
        if self.tokens is None or self.tokens.values is None:
            raise ValueError("the objective reads values before tokens, which it was not given")
        return self.tokens.values

    @property
    def given_scores(self) -> Tensor:
        """The head's scores, [G, K]. Raises ValueError when they were not read."""
        if self.scores is None:
            raise ValueError("the objective reads the scores of a head, which it was not given")
        return self.scores

    def known(self, name: str) -> Tensor:
        """What is known of each token under this name, [E]. Raises ValueError when nothing is."""
        if self.tokens is None or name not in self.tokens.given:
            raise ValueError(f"the objective reads '{name}' of each token, which it was not given")
        return self.tokens.given[name]

    def count(self, name: str) -> Tensor:
        """Tokens of each group of which it is known, [G]."""
        return self.summed((~self.known(name).isnan()).float()).sum(1)

    def summed(self, per_token: Tensor) -> Tensor:
        """Sums of a number per token, [E], over each completion: [G, K]."""
        assert self.tokens is not None
        place = self.tokens.group * self.mask.shape[1] + self.tokens.completion
        return per_token.new_zeros(self.mask.numel()).index_add(0, place, per_token).view(self.mask.shape)

    def spread(self, per_completion: Tensor) -> Tensor:
        """A number per completion, [G, K], at each of its tokens: [E]."""
        assert self.tokens is not None
        return per_completion[self.tokens.group, self.tokens.completion]

    def select(self, rows: Sequence[int]) -> GroupLogProbs:
        """Some of the groups, in the given order."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.logp.device)
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {name: value[index] for name, value in chosen.items() if isinstance(value, Tensor) and name != "mismatched"}
        return replace(self, **parts, tokens=self.tokens.select(rows) if self.tokens is not None else None)


def layout(groups: Sequence[Group], lengths: Sequence[Sequence[int]], given: Mapping[str, Tensor] | None = None) -> GroupLogProbs:
    """The parts of `GroupLogProbs` that do not depend on a model; `lengths` holds scored tokens per completion per group.

    With `given` (which may be empty) there are places for the single tokens too; its tensors are [E].
    """
    width = max((len(g.completions) for g in groups), default=1)
    shape = (len(groups), width)
    length, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    targets, rewards = torch.zeros(shape), torch.full(shape, float("nan"))
    for row, (group, sizes) in enumerate(zip(groups, lengths, strict=True)):
        k = len(group.completions)
        length[row, :k] = torch.tensor(sizes)
        mask[row, :k] = True
        targets[row, :k] = torch.tensor(shares(group))
        if group.rewards is not None:
            rewards[row, :k] = torch.tensor([float("nan") if r is None else r for r in group.rewards])
    tokens = _tokens(length, given) if given is not None else None
    return GroupLogProbs(torch.zeros(shape), length, mask, targets, rewards, torch.tensor([g.weight for g in groups]), tokens)


def _tokens(length: Tensor, given: Mapping[str, Tensor]) -> Tokens:
    flat = length.flatten()
    place = torch.repeat_interleave(torch.arange(len(flat)), flat)
    position = torch.arange(len(place)) - (flat.cumsum(0) - flat)[place]
    return Tokens(place // length.shape[1], place % length.shape[1], position, torch.zeros(len(place)), given=dict(given))


def shares(group: Group) -> list[float]:
    """The target of each completion. Without targets all is on the one with the highest known reward, equals sharing it; without rewards on the first."""
    if group.targets is not None:
        return list(group.targets)
    known = [reward for reward in group.rewards or () if reward is not None]
    top = max(known, default=None)
    best = [k for k, reward in enumerate(group.rewards or ()) if reward is not None and reward == top] or [0]
    return [(k in best) / len(best) for k in range(len(group.completions))]


def unscored(group: Group) -> bool:
    """Whether its rewards are but the 1 and 0 that a preference or a label without scores is read as. Those from a reward never are."""
    if group.rewards is None or group.targets is not None or group.provenance.get("scored"):
        return False
    return "label" in group.provenance if len(group.rewards) == 1 else sorted(map(str, group.rewards)) == ["0.0", "1.0"]


def sides(group: Group) -> list[float | None]:
    """1 for the preferred completion by `shares`, -1 for the others; None for those that share the first place: none of them is preferred."""
    found = shares(group)
    return [-1.0 if share < max(found) else 1.0 if found.count(share) == 1 else None for share in found]


def keep(group: Group, chosen: Sequence[int]) -> Group:
    """The group with some of its completions. Their targets need no longer sum to 1."""
    if list(chosen) == list(range(len(group.completions))):
        return group
    kept = {name: tuple(values[k] for k in chosen) for name in ("completions", "targets", "rewards") if (values := getattr(group, name)) is not None}
    return group.model_copy(update={"targets": tuple(shares(group)[k] for k in chosen)} | kept)


def preferred(group: Group) -> Group:
    """The group without completions that have no share in its target: what an objective that imitates is given."""
    return keep(group, [k for k, share in enumerate(shares(group)[: len(group.completions)]) if share > 0])


def examples(group: Group) -> Group:
    """The preferred completions; none of a row that was labelled false."""
    return keep(group, []) if group.provenance.get("label") is False else preferred(group)
