"""From rewards to advantages: by how much an answer, or one token of it, was better than was to be expected.

Rewards are [G, K] (K answers to each of G prompts), float, NaN where an answer could not be scored. Such an answer is left out of every
baseline and has the advantage 0; `Advantages.usable` says which ones count.
Sources: leave-one-out, Kool et al. 2019 and Ahmadian et al. 2024, arXiv:2402.14740; group normalisation, Shao et al. 2024,
arXiv:2402.03300; batch whitening over a group baseline, Hu et al. 2025, arXiv:2501.03262; generalised advantage estimation,
Schulman et al. 2015, arXiv:1506.02438.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 1e-4
"""Added to a group's standard deviation; the published implementations agree on it."""
EQUAL = 1e-6
"""Rewards of a group that differ by no more than this teach nothing."""


class Advantages(NamedTuple):
    """By how much each of G x K answers was better than its siblings."""

    values: Tensor
    """[G, K]; 0 where the answer does not count."""
    usable: Tensor
    """Whether the answer was scored and had something to be compared with, [G, K], bool."""
    flat: Tensor
    """Whether all scored answers of the group have one reward, so that nothing can be learnt from it, [G], bool."""

    @property
    def flat_share(self) -> float:
        """Share of the groups that teach nothing; 0 for no groups."""
        return float(self.flat.float().mean()) if len(self.flat) else 0.0


def leave_one_out(rewards_GK: Tensor) -> Advantages:
    """Each reward less the mean of the other answers' rewards to the same prompt. An answer that is the only scored one does not count."""
    scored, count = _scored(rewards_GK)
    total = rewards_GK.nan_to_num(0.0).sum(1, keepdim=True)
    values = rewards_GK - (total - rewards_GK) / (count - 1).clamp(min=1)
    return _advantages(rewards_GK, values, scored & (count > 1))


def group_normalised(rewards_GK: Tensor, *, divide: bool = True) -> Advantages:
    """Each reward less the group's mean, over the group's standard deviation + 1e-4 (of a sample: K - 1 in the denominator).

    Without `divide` groups of widely spread rewards count for more, and easy and hard prompts are not raised to the same weight.
    """
    scored, count = _scored(rewards_GK)
    centred = _centred(rewards_GK)
    if divide:
        spread = (centred.nan_to_num(0.0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (spread + SMALL)
    return _advantages(rewards_GK, centred, scored & (count > 1))


def batch_whitened(rewards_GK: Tensor) -> Advantages:
    """Each reward less the group's mean, then brought to mean 0 and standard deviation 1 over all answers of the batch."""
    scored, count = _scored(rewards_GK)
    usable = scored & (count > 1)
    return _advantages(rewards_GK, whiten(_centred(rewards_GK).nan_to_num(0.0), usable), usable)


def whiten(values: Tensor, mask: Tensor, *, centre: bool = True) -> Tensor:
    """The values at mean 0 and variance 1 over the places of `mask`, which has their shape; 0 elsewhere. With `centre` off the mean stays.

    The variance is that of a sample. Fewer than two places, or equal values, have no spread and give 0 (or the mean).
    """
    weight = mask.to(values.dtype)
    count = weight.sum()
    mean = (values * weight).sum() / count.clamp(min=1)
    variance = ((values - mean).square() * weight).sum() / (count - 1).clamp(min=1)
    white = (values - mean) * (variance + 1e-8).rsqrt()
    return (white if centre else white + mean) * weight


def token_rewards(rewards_N: Tensor, kl_NT: Tensor, length_N: Tensor, *, beta: float) -> Tensor:
    """Reward of each token, [N, T]: -beta times its KL estimate, and the answer's own reward at its last real token (the end token,
    where there is one). Places beyond `length_N` are 0; every answer has at least one token.
    """
    place = torch.arange(kl_NT.shape[1], device=kl_NT.device)
    inside, last = place < length_N[:, None], place == length_N[:, None] - 1
    return (-beta * kl_NT).where(inside, kl_NT.new_zeros(())) + rewards_N[:, None] * last


def gae(rewards_NT: Tensor, values_NT: Tensor, length_N: Tensor, *, gamma: float = 1.0, decay: float = 0.95) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [N, T] and 0 beyond `length_N`: the discounted sum of one-step surprises r + gamma V' - V.

    `values_NT` are expectations before each token; after the last token nothing more is expected. Returns are advantages + values.
    """
    inside = torch.arange(values_NT.shape[1], device=values_NT.device) < length_N[:, None]
    values_NT = values_NT * inside
    advantages_NT = torch.zeros_like(values_NT)
    later, following = values_NT.new_zeros(len(values_NT)), values_NT.new_zeros(len(values_NT))
    for t in reversed(range(values_NT.shape[1])):
        surprise = rewards_NT[:, t] + gamma * following - values_NT[:, t]
        later = (surprise + gamma * decay * later) * inside[:, t]
        advantages_NT[:, t] = later
        following = values_NT[:, t]
    return advantages_NT, (advantages_NT + values_NT) * inside


def _scored(rewards_GK: Tensor) -> tuple[Tensor, Tensor]:
    """Which answers were scored, [G, K], and how many of each group, [G, 1]."""
    scored = ~rewards_GK.isnan()
    return scored, scored.sum(1, keepdim=True)


def _centred(rewards_GK: Tensor) -> Tensor:
    return rewards_GK - rewards_GK.nanmean(1, keepdim=True)


def _advantages(rewards_GK: Tensor, values: Tensor, usable: Tensor) -> Advantages:
    low, high = rewards_GK.nan_to_num(torch.inf).amin(1), rewards_GK.nan_to_num(-torch.inf).amax(1)
    # a group of which nothing was scored has high = -inf, and is flat too
    return Advantages(values.where(usable, values.new_zeros(())), usable, high - low <= EQUAL)
