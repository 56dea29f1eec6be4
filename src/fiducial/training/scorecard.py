"""What scores of completions are held against: which of two is the better one, and how well a model that scores them says so."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from fiducial.core.errors import DataError
from fiducial.core.intervals import spearman
from fiducial.training.objective import GroupLogProbs

BINS = 10
"""Of the calibration error, over confidences from 0.5 to 1."""


MATCHED = 0.1
"""Share by which the lengths of two completions of equal length may differ."""
TOGETHER = ("calibration_error", "length_correlation", "length_correlation_at_equal_label")
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
    ties:               share of those pairs whose scores are equal
    accuracy_when_shorter: accuracy where the better completion is the shorter one: a model that rewards length fails here
    accuracy_at_equal_length: accuracy where the lengths differ by a tenth of the longer at most
    length_correlation: of score and number of tokens, over all completions (Spearman)
    length_correlation_at_equal_label: the same when the label (target or reward) is held fixed (partial), where better answers are longer ones
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
        said["ties"] = float((ahead == 0).float().mean())
        length = groups.length.float()
        apart, longest = difference(length), torch.maximum(length.unsqueeze(2), length.unsqueeze(1))
        kinds = {"when_shorter": (-apart * sign)[ordered] > 0, "at_equal_length": (apart.abs() <= MATCHED * longest)[ordered]}
        said |= {f"accuracy_{name}": float(right[some].mean()) for name, some in kinds.items() if bool(some.any())}
    return said | _length_correlations(scores, groups, labels)


def _length_correlations(scores: Tensor, groups: GroupLogProbs, labels: str) -> dict[str, float]:
    """Those of score and length that the data says; nothing where either is the same everywhere, and no partial one where the label decides all."""
    label = groups.rewards if labels == "rewards" else groups.targets
    known = groups.mask & ~label.isnan()
    score, length = scores[groups.mask].tolist(), groups.length[groups.mask].tolist()
    if min(len(set(score)), len(set(length))) < 2:
        return {}
    found = {"length_correlation": spearman(score, length)}
    score, length, worth = (values[known].tolist() for values in (scores, groups.length, label))
    if len(score) > 2:
        straight, by_score, by_length = spearman(score, length), spearman(score, worth), spearman(length, worth)
        rest = sqrt(max(0.0, (1 - by_score**2) * (1 - by_length**2)))
        if rest > 1e-6:
            found["length_correlation_at_equal_label"] = max(-1.0, min(1.0, (straight - by_score * by_length) / rest))
    return found


def _calibration_error(ahead: Tensor, right: Tensor) -> float:
    confidence = torch.sigmoid(ahead.abs())
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    apart = torch.zeros(BINS).index_add(0, place, confidence - right)
    return float(apart.abs().sum() / len(ahead))
