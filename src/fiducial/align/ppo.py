"""Proximal policy optimisation with a value head.

What it does: draws answers from the policy and raises each token by how much better things went than a value head had expected, within a
              clip; the head learns along. The reward stands on the last token, minus a KL term on every token. Under a cost limit a second head
              values the cost, so that neither has to learn anew when the multiplier moves.
Use it when:  answers are long and single tokens are to be told apart, or one answer per prompt is all there is. With several answers per
              prompt align/rloo and align/grpo need no value head.
Formula:      r_t = -beta log(pi_old / ref) + [t last] R; A = GAE(r, V), whitened over the batch; loss = -min(q A, clip(q, 1 - c, 1 + c) A)
              + value * max((V - G)^2, (clip(V, V_old - c_v, V_old + c_v) - G)^2) / 2, q = pi / pi_old, G = GAE + V_old, c_v = value_clip.
              Under a cost limit (safe RLHF): c_t = beta log(pi_old / ref) + [t last] C, so that the KL counts beta whatever w is; a second head V_c
              with the same loss towards a G_c of its own; A = (GAE(r, V) - w GAE(c, V_c)) / (1 + w), whitened, w the multiplier.
Defaults:     beta 0.05, clip_ratio 0.2, value 0.1, value_clip 0.2, gamma 1, decay 0.95, 4 updates per batch, learning rate 3e-6 (the study of
              details, which besides gives cut answers a reward of -1, samples at temperature 0.7, lets the rate fall in a line and has eps 1e-5 in Adam;
              here nothing but for an end_penalty that is given, temperature 1, a cosine and eps 1e-8). The value head is on the policy's own
              backbone, as that of the cost is (ours; models less in memory). With demonstrations mixed in it is PPO-ptx, for which InstructGPT has
              mix 27.8.
Limits:       one backbone for several tasks: a large `value` bends the policy's states. Whitening, which the code of safe RLHF leaves out, takes
              the size of A away, and with it what 1 + w divides by; what w decides is the direction. The KL stands in reward and cost, as in that code.
Source:       Schulman et al. 2017, arXiv:1707.06347, eq. 9; details: Huang et al. 2024, arXiv:2403.17031; demonstrations: Ouyang et al.
              2022, arXiv:2203.02155, eq. 2; two critics: Dai et al. 2023, arXiv:2310.12773, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fiducial.core.roles import Reading
from fiducial.training.advantages import EQUAL, gae, token_rewards, whiten
from fiducial.training.objective import GroupLogProbs, Tokens
from fiducial.training.policy_gradient import Lessons, SampledObjective, clip_share, clipped, counts, known, moved


@final
@dataclass(frozen=True, slots=True)
class PPO(SampledObjective):
    """Clipped policy gradient with generalised advantage estimation."""

    on_policy: ClassVar[bool] = True
    reads: ClassVar[tuple[Reading, ...]] = ("tokens", "values")
    updates: ClassVar[int] = 4
    values_cost: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-6

    beta: float = 0.05
    """Weight of the KL in the reward, per nat; >= 0."""
    clip_ratio: float = 0.2
    """How far the probability ratio of a token may move from 1 and still be rewarded, in (0, 1)."""
    value: float = 0.1
    """Weight of the value head's loss; > 0."""
    value_clip: float = 0.2
    """How far a value may move on one batch and still be rewarded; > 0."""
    gamma: float = 1.0
    """What a reward one token later is worth, in (0, 1]."""
    decay: float = 0.95
    """Lambda of the advantage estimate, in [0, 1]: 0 trusts the value head, 1 the rewards alone."""

    def __post_init__(self) -> None:
        bounds = (self.beta >= 0, 0 < self.clip_ratio < 1, self.value > 0, self.value_clip > 0, 0 < self.gamma <= 1, 0 <= self.decay <= 1)
        if not all(bounds):
            wrong = [name for name, fine in zip(("beta", "clip_ratio", "value", "value_clip", "gamma", "decay"), bounds, strict=True) if not fine]
            raise ValueError(f"{wrong[0]} is out of range: {getattr(self, wrong[0])}")

    def lessons(self, old: GroupLogProbs, reference: GroupLogProbs, *, room: int) -> Lessons:
        """Advantage and return of each token; under a cost limit the return of the cost too."""
        tokens, before = _tokens(old, self.name), _tokens(reference, self.name)
        place, worth = _Places(old), old.rewards
        drift = place.square(tokens.logp - before.logp)
        advantages, given = self._valued(place, old.rewards, tokens.values, drift, self.beta)
        if old.costs is not None:
            of_costs, more = self._valued(place, old.costs, tokens.cost_values, drift, -self.beta)
            advantages, worth = (_balanced(*pair, old.cost_weight) for pair in ((advantages, of_costs), (old.rewards, old.costs)))
            given |= {f"cost_{name}": values for name, values in more.items()}
        given |= {"advantage": place.flat(whiten(advantages, place.inside)), "share": torch.ones(len(tokens.logp))}
        worth = worth.where(old.mask, torch.nan)
        spread = worth.nan_to_num(-torch.inf).amax(1) - worth.nan_to_num(torch.inf).amin(1)
        return Lessons(given, (spread <= EQUAL) & (old.mask.sum(1) > 1))

    def counted(self, groups: GroupLogProbs) -> Tensor:
        """Tokens of each group, [G]."""
        return counts(groups, "token")

    def surrogate(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Loss per group, [G]."""
        tokens, (advantage, goal, expected, share) = known(policy, "advantage", "return", "expected", "share", objective=self.name)
        surprise = self._surprise(tokens.values, goal, expected)
        if "cost_return" in tokens.given:
            surprise = surprise + self._surprise(tokens.cost_values, tokens.given["cost_return"], tokens.given["cost_expected"])
        return policy.summed(share * (clipped(moved(tokens), advantage, self.clip_ratio, self.clip_ratio) + self.value * surprise)).sum(1)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Share of tokens whose gradient the clip stops; share of the returns' variance that each value head explains."""
        tokens, (advantage, share) = known(policy, "advantage", "share", objective=self.name)
        heads = [head for head in ("", "cost_") if f"{head}return" in tokens.given]
        explained = {f"{head}explained": _explained(tokens.given[f"{head}return"], tokens.given[f"{head}expected"], share > 0) for head in heads}
        return {"clipped": clip_share(moved(tokens), advantage, self.clip_ratio, self.clip_ratio)} | explained

    def _valued(self, place: _Places, given_GK: Tensor, values: Tensor | None, drift: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages, [N, T], of what answers were given and `-beta` times the KL, by a head's values; what that head is to learn."""
        assert values is not None
        rewards = token_rewards(given_GK[place.mask], drift, place.length, beta=beta)
        advantages, returns = gae(rewards, place.square(values.float()), place.length, gamma=self.gamma, decay=self.decay)
        return advantages, {"return": place.flat(returns), "expected": values.float()}

    def _surprise(self, values: Tensor | None, goal: Tensor, expected: Tensor) -> Tensor:
        """Loss of a value head at each token, [E]."""
        assert values is not None
        near = values.clamp(expected - self.value_clip, expected + self.value_clip)
        return torch.maximum((values - goal).square(), (near - goal).square()) / 2


class _Places:
    """Where the tokens of N answers stand in an [N, T] square."""

    def __init__(self, parts: GroupLogProbs) -> None:
        assert parts.tokens is not None
        self.mask, self.length = parts.mask, parts.length[parts.mask]
        number = parts.mask.flatten().cumsum(0) - 1
        self.row, self.column = number[parts.tokens.group * parts.mask.shape[1] + parts.tokens.completion], parts.tokens.position
        self.shape = (len(self.length), int(self.length.max()))
        self.inside = torch.arange(self.shape[1]) < self.length[:, None]

    def square(self, flat: Tensor) -> Tensor:
        """[E] as [N, T], zeros beyond the end of an answer."""
        return flat.new_zeros(self.shape).index_put((self.row, self.column), flat)

    def flat(self, square: Tensor) -> Tensor:
        """[N, T] as [E]."""
        return square[self.row, self.column]


def _balanced(reward: Tensor, cost: Tensor, weight: float) -> Tensor:
    return (reward - weight * cost) / (1 + weight)


def _explained(goal: Tensor, expected: Tensor, of: Tensor) -> float:
    return float(1 - (goal - expected)[of].var(correction=0) / goal[of].var(correction=0).clamp(min=1e-8))


def _tokens(parts: GroupLogProbs, objective: str) -> Tokens:
    tokens, _ = known(parts, objective=objective)
    return tokens
