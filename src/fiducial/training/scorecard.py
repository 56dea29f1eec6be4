"""What scores of completions are held against: which of two is the better one, and how well a model that scores them says so."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fiducial.core.errors import DataError
from fiducial.training.objective import GroupLogProbs

BINS = 10
"""Of the calibration error, over confidences from 0.5 to 1."""


TOGETHER = ("calibration_error", "length_correlation")
"""Figures of many groups together: of one they say nothing, and neither does the mean over such."""


class Comparisons(NamedTuple):
    """All pairs of completions of one prompt, [G, K, K]; each pair stands once, in the upper triangle."""

    preference: Tensor
    """Probability that the row's completion is better than the column's; 0.5 where nothing is known."""
    known: Tensor
    """Whether the pair says anything, bool."""
    gap: Tensor
    """By how much the rewards differ, >= 0; 0 where unknown."""


def comparisons(groups: GroupLogProbs, labels: str) -> Comparisons:
    """Pairs by `targets` (t_i / (t_i + t_j), the rule of Luce: the probability that i is better if one of the two is best) or by `rewards`.

    Two completions that can neither be the best are compared by their rewards too: rewards alone make one completion the best, and order
    the others. Completions of no reward and ties of rewards say nothing.
    """
    both = (groups.mask.unsqueeze(2) & groups.mask.unsqueeze(1)).triu(1)
    gap = groups.rewards.unsqueeze(2) - groups.rewards.unsqueeze(1)
    known = both & ~gap.isnan() & (gap != 0)
    preference = (gap > 0).float()
    if labels == "targets":
        total = groups.targets.unsqueeze(2) + groups.targets.unsqueeze(1)
        told = both & (total > 0)
        known, preference = known | told, torch.where(told, groups.targets.unsqueeze(2) / total.where(total > 0, 1), preference)
    return Comparisons(preference.where(known, 0.5), known, gap.abs().nan_to_num(0.0))


def difference(scores: Tensor) -> Tensor:
    """Score of the row's completion less that of the column's, [G, K, K]."""
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def pair_mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean over the known pairs of each group, [G]; 0 where there is none."""
    return values.where(known, 0).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)


def figures(scores: Tensor, groups: GroupLogProbs, labels: str) -> dict[str, float]:
    """How well scores, [G, K], order the completions of a prompt; higher is better. Says nothing of what it cannot tell.

    accuracy:           share of pairs whose better completion has the higher score (a tie counts half)
    calibration_error:  expected difference between confidence, sigmoid(|difference|), and accuracy, in ten bins
    margin:             mean score of the better completion less that of the other
    length_correlation: of score and number of tokens, over all completions (Pearson)
    accuracy_when_shorter: accuracy where the better completion is the shorter one: a model that rewards length fails here
    Raises DataError when there are no scores.
    """
    if not bool(groups.mask.any()):
        raise DataError("there is nothing to score", hint="give groups with completions")
    found = comparisons(groups, labels)
    ordered = found.known & (found.preference != 0.5)
    sign = torch.where(found.preference > 0.5, 1.0, -1.0)
    ahead = (difference(scores) * sign)[ordered]
    said: dict[str, float] = {"score": float(scores[groups.mask].mean())}
    if len(ahead):
        right = (ahead > 0).float() + 0.5 * (ahead == 0).float()
        said |= {"accuracy": float(right.mean()), "margin": float(ahead.mean()), "calibration_error": _calibration_error(ahead, right)}
        shorter = (-difference(groups.length.float()) * sign)[ordered] > 0
        if bool(shorter.any()):
            said["accuracy_when_shorter"] = float(right[shorter].mean())
    both = torch.stack([scores[groups.mask], groups.length[groups.mask].float()])
    if both.shape[1] > 1 and bool((both.std(1) > 0).all()):
        said["length_correlation"] = float(torch.corrcoef(both)[0, 1])
    return said


def _calibration_error(ahead: Tensor, right: Tensor) -> float:
    confidence = torch.sigmoid(ahead.abs())
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    apart = torch.zeros(BINS).index_add(0, place, confidence - right)
    return float(apart.abs().sum() / len(ahead))
