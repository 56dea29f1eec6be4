"""Answers under a score head, and what the scores of one prompt's answers say beside its rewards or another head's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import inf
from statistics import fmean
from typing import TYPE_CHECKING

from fiducial.core.errors import ModelError
from fiducial.core.intervals import best_of_n, spearman
from fiducial.core.records import Completion, Group
from fiducial.models.base import WhiteBox

if TYPE_CHECKING:
    from torch import Tensor

    from fiducial.models.base import Model
    from fiducial.training.objective import GroupLogProbs

GOLD = {"gold_correlation": (-1.0, 1.0), "gold_gain": (-inf, inf)}
"""Figures of `agreement`, with their bounds."""


def headed(model: Model) -> WhiteBox:
    """The model, if it has a head that is read at the end of an answer. Raises ModelError."""
    from fiducial.models.scorehead import BY_STEPS, BY_TOKENS

    if not isinstance(model, WhiteBox) or model.head is None:
        raise ModelError(f"{model.uri} has no score head", hint="give run:ID of a run of fiducial align reward_model")
    elsewhere = ({BY_STEPS: "at the end of each step"} | dict.fromkeys(BY_TOKENS, "before each token")).get(model.head.trained_by)
    if elsewhere:
        hint = "give a reward or cost model; a process model is tried by fiducial evaluate best_of_n, option --reward"
        raise ModelError(f"{model.uri} was trained by {model.head.trained_by} to be read {elsewhere}, not at the end of an answer", hint=hint)
    return model


def asked(groups: Sequence[Group]) -> tuple[list[tuple[Group, Completion]], list[int]]:
    """All answers of some groups, and how many each has."""
    return [(g, c) for g in groups for c in g.completions], [len(g.completions) for g in groups]


def scored(model: WhiteBox, answers: Sequence[tuple[Group, Completion]], sizes: Sequence[int]) -> list[list[float]]:
    """Scores of the answers, higher = better, in lists of the given sizes."""
    assert model.head is not None
    sign = 1.0 if model.head.higher_is == "better" else -1.0
    values = iter(model.rated([model.encode(g.prompt.messages, c.text, end=c.finish != "length")[0] for g, c in answers]).tolist()) if answers else iter(())
    return [[sign * next(values) for _ in range(size)] for size in sizes]


def laid_out(model: WhiteBox, groups: Sequence[Group], rows: Sequence[list[float]]) -> tuple[GroupLogProbs, Tensor]:
    """The groups as objectives see them, and their scores, [G, K]."""
    import torch

    from fiducial.training.objective import layout

    encoded = [[model.encode(g.prompt.messages, c.text, end=c.finish != "length") for c in g.completions] for g in groups]
    parts = layout(groups, [[len(ids) - start for ids, start in row] for row in encoded])
    scores = torch.zeros(parts.mask.shape)
    for i, row in enumerate(rows):
        scores[i, : len(row)] = torch.tensor(row)
    return parts, scores


def agreement(group: Group, scores: Sequence[float]) -> dict[str, float]:
    """Figures of `GOLD` for one prompt; none for fewer than three answers of known rewards that differ: of two, accuracy says it all."""
    known = [(score, gold) for score, gold in zip(scores, group.rewards or (), strict=False) if gold is not None]
    proxy, gold = [score for score, _ in known], [gold for _, gold in known]
    if len(known) < 3 or len(set(gold)) < 2:
        return {}
    return {"gold_correlation": spearman(proxy, gold), "gold_gain": best_of_n(proxy, gold, len(gold)) - fmean(gold)}


def apart(rows: Sequence[Sequence[float]]) -> float:
    """Of the pairs of one prompt's answers, the share that two of the models order differently, mean over pairs of models; what only one has level is half."""
    return fmean(
        abs(_sign(one[i] - one[j]) - _sign(other[i] - other[j])) / 2 for one, other in combinations(rows, 2) for i, j in combinations(range(len(one)), 2)
    )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
